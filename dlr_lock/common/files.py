"""Files: directories that appear whole or not at all, and JSON objects."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
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
    nearest = writable_folder(target.absolute().parent)
    if target.is_dir():
        if _is_mounted(target):
            raise DLRError(f"{target} is a mount point, which cannot be replaced: give a new folder in it")
        owners = (0, nearest.stat().st_uid, target.stat().st_uid)
        if nearest.stat().st_mode & stat.S_ISVTX and os.geteuid() not in owners:
            raise DLRError(f"{target} is another user's and cannot be replaced: choose another output")


def writable_folder(path: Path) -> Path:
    """The folder that `path` is, or the nearest one above it that exists.

    Raises:
        DLRError: Where nothing can be written into it.
    """
    nearest = _existing(path)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise DLRError(f"cannot write to {nearest}")
    return nearest


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


@contextmanager
def whole_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `target` that becomes it when the block ends, and vanishes if it fails.

    Ctrl-C leaves nothing behind; what a killed process left is removed here by the next one with the same target. The
    umask decides on the permissions of all that is written, whatever wrote it.

    Raises:
        DLRError: As `check_target` does, and where the device is full.
    """
    _sweep(target)
    check_target(target, overwrite=overwrite)
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work, lock = _temporary(target, ".partial")
    except OSError as error:
        raise DLRError(f"cannot write to {target}: {error.strerror}") from error
    try:
        with full_disk_is_an_error(target):
            yield work
            _finish(work)
        check_target(target, overwrite=overwrite)  # another run may have been faster
        _swap(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _unlock(lock)
        with suppress(OSError):  # not empty: the target is there, or something else by now
            for parent in made:
                parent.rmdir()


@contextmanager
def permission_is_an_error() -> Iterator[None]:
    """Turns what the system does not permit into a DLRError that says so."""
    try:
        yield
    except PermissionError as error:
        what = error.filename or first_line(error)
        raise DLRError(f"{what}: permission denied; change its permissions or ask its owner") from error


def check_readable(folder: Path, *patterns: str) -> None:
    """Raises DLRError on a file of a folder, by glob patterns, that may not be read, and on such a folder.

    Readers of other packages call such a file missing or damaged.
    """
    with permission_is_an_error():
        os.listdir(folder)
        os.stat(folder / ".")  # a folder may be listed and still not be entered
        for path in (path for pattern in patterns for path in folder.glob(pattern)):
            if path.is_file():
                path.open("rb").close()


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
    nearest = _existing(target)
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


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON object in a file, or the list; raises DLRError where there is none."""
    with permission_is_an_error():
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except PermissionError:
            raise
        except (OSError, ValueError) as error:
            raise DLRError(f"{path} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(value, kind):
        raise DLRError(f"{path} is not a JSON {'object' if kind is dict else 'array'}")
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


def _is_mounted(target: Path) -> bool:
    """Whether a directory is a mount point; one folder bound over another is so to Linux' own list alone."""
    try:
        lines = (
            Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        )
    except OSError:
        return os.path.ismount(target)
    points = {re.sub(r"\\([0-7]{3})", lambda c: chr(int(c[1], 8)), line.split()[4]) for line in lines}
    return str(target.resolve()) in points or os.path.ismount(target)


def _temporary(target: Path, suffix: str) -> tuple[Path, int | None]:
    """A new directory beside `target`, and its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=suffix, dir=target.parent))
        with suppress(BlockingIOError, FileNotFoundError):  # another run took it for a leftover
            return folder, _lock(folder)


def _lock(folder: Path) -> int | None:
    """Makes a directory this process's own until it ends; None where there are no locks.

    Raises:
        BlockingIOError: Where another process has it.
        FileNotFoundError: Where it is gone.
    """
    if fcntl is None:
        return None
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # such as a network's file system without locks
        os.close(file)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return file


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _sweep(target: Path) -> None:
    """Clears away what runs that were killed left beside `target`, and puts back a directory that was being replaced.

    What a living process has, or may have where there are no locks, stays.
    """
    ours = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.(partial|old)")
    found: list[Path] = []
    with suppress(OSError):  # there is none, or it may not be listed
        found = sorted(target.parent.iterdir())
    for folder in (path for path in found if ours.fullmatch(path.name) and not path.is_symlink()):
        with suppress(OSError):
            if (lock := _lock(folder)) is None:
                continue
            if (before := folder / target.name).exists() and folder.suffix == ".old" and not target.exists():
                before.rename(target)
            shutil.rmtree(folder, ignore_errors=True)
            _unlock(lock)


def _swap(work: Path, target: Path) -> None:
    if not target.exists():
        work.rename(target)
        return
    # A directory cannot be exchanged in one step by portable means: between the two renames the old one
    # stands beside, whole, and is put back if the second fails.
    old, lock = _temporary(target, ".old")
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
        _unlock(lock)


def _finish(folder: Path) -> None:
    """Brings all files to the disk, with the permissions of new ones: mkdtemp and safetensors give 0700 and 0600."""
    mask = _umask()
    for path in (folder, *folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
