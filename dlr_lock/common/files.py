"""Files: directories that appear whole or not at all, and JSON objects."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import DLRError, first_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_CHUNK = 16 * 2**20  # bytes read at a time while hashing

MANIFEST = "dlr_manifest.json"  # marks a directory as ours: only such a one is ever replaced


def check_target(target: Path, *, overwrite: bool) -> None:
    """Looks before long work, not after it, whether a directory can be written.

    Args:
        target: The directory. One that exists is taken if it is empty, or, with `overwrite`, a locked checkpoint.
        overwrite: Whether a locked checkpoint is replaced.

    Raises:
        DLRError: Where it cannot be written.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise DLRError(f"{target} exists and is not a directory")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise DLRError(f"{target} exists; choose another output or pass --overwrite")
        if not (target / MANIFEST).is_file():
            raise DLRError(
                f"{target} is no locked checkpoint, so --overwrite leaves it alone; remove it yourself"
            )
        if strange := _not_ours(target):
            raise DLRError(
                f"{target} also holds {strange}, which --overwrite would delete; move it away first"
            )
    nearest = next(p for p in target.absolute().parents if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise DLRError(f"cannot write to {nearest}")


@contextmanager
def whole_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `target` that becomes it when the block ends, and vanishes if it fails.

    Ctrl-C leaves nothing behind.

    Raises:
        DLRError: As `check_target` does, and where the device is full.
    """
    check_target(target, overwrite=overwrite)
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise DLRError(f"cannot write to {target}: {error.strerror}") from error
    try:
        with full_disk_is_an_error(target):
            yield work
            _sync(work)
        check_target(target, overwrite=overwrite)  # another run may have been faster
        work.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would hide the checkpoint from other users
        _swap(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):  # not empty: the target is there, or something else by now
            for parent in made:
                parent.rmdir()


@contextmanager
def full_disk_is_an_error(where: Path) -> Iterator[None]:
    """Turns 'no space left', also as safetensors words it, into a DLRError."""
    try:
        yield
    except Exception as error:
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise DLRError(
                f"no space left on the device while writing {where}; nothing of it was kept"
            ) from error
        raise


def check_space(target: Path, wanted: int) -> None:
    """Raises DLRError where the device of `target` has less than `wanted` bytes free."""
    nearest = next(p for p in (target.absolute(), *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(nearest).free
    if free < wanted:
        raise DLRError(f"{nearest} has {free / 2**20:.0f} MiB free, {wanted / 2**20:.0f} MiB are needed")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write(a path beside `path`), and puts in place what it wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def hash_files(files: Sequence[Path], *, named: bool = False) -> str:
    """SHA-256 in hexadecimal over the files' bytes, one after the other; named: over name and size of each before."""
    digest = hashlib.sha256()
    for path in files:
        if named:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def exclusive(path: Path, taken: str) -> Iterator[None]:
    """A file, made if need be, is this process's alone while the block runs, and let go of whatever ends the process.

    Where the system has no such locks, nothing is kept out.

    Raises:
        DLRError: With the message `taken`, where another process has it.
    """
    if fcntl is None:
        yield
        return
    with ExitStack() as stack:
        for _ in range(100):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(path.open("w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                continue  # who had it has removed the folder in between
            except BlockingIOError:
                raise DLRError(taken) from None
            except PermissionError as error:
                raise DLRError(f"cannot write to {path.parent}: {error.strerror}") from error
            except OSError:
                break  # such as a network's file system without them
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break  # else it is the lock of a file that has been removed
        yield


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises DLRError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DLRError(f"{path} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise DLRError(f"{path} is not a JSON object")
    return value


def _not_ours(target: Path) -> str | None:
    """A file in a checkpoint that its manifest does not list, if there is one."""
    try:
        listed = set(json.loads((target / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        listed = set()
    for path in sorted(target.rglob("*")):
        name = str(path.relative_to(target))
        if not path.is_dir() and name not in listed | {MANIFEST}:
            return name
    return None


def _swap(work: Path, target: Path) -> None:
    if not target.exists():
        work.rename(target)
        return
    # A directory cannot be exchanged in one step by portable means: between the two renames the old one
    # stands beside, whole, and is put back if the second fails.
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    try:
        target.rename(old / target.name)
        work.rename(target)
    except BaseException:
        if not target.exists():
            (old / target.name).rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
