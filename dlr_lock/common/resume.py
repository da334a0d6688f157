"""What long work keeps as it goes: every finished part, so that an interruption costs one at most."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import DLRError
from .files import exclusive, full_disk_is_an_error, read_json

_ABOUT = "run.json"
_SPENT = "spent.json"
_CLAIM = "claimed.part"  # no part of a run, as the name says


@contextmanager
def run_lock(target: Path) -> Iterator[None]:
    """An output, and what is kept for it, are this process's alone while the block runs.

    A Ctrl-C in the block says what is kept.

    Raises:
        DLRError: Where another process has them.
    """
    folder = _folder(target)
    made = [parent for parent in folder.parents if not parent.exists()]
    claim = folder / _CLAIM
    try:
        with (
            interrupted_words(target),
            exclusive(claim, f"another run is writing to {folder}: choose another output"),
        ):
            try:
                yield
            finally:
                with suppress(OSError):
                    claim.unlink()
                with suppress(OSError):  # not empty: something is kept
                    folder.rmdir()
    finally:
        with suppress(OSError):
            for parent in made:
                parent.rmdir()


@contextmanager
def interrupted_words(target: Path) -> Iterator[None]:
    """A Ctrl-C in the block says what is kept of an output's finished parts."""
    folder = _folder(target)
    try:
        yield
    except KeyboardInterrupt as stop:
        if not (count := _count(folder)):
            raise
        raise KeyboardInterrupt(
            f"interrupted; {count} finished parts are kept in {folder}: the same command goes on from there"
        ) from stop


class ResumeStore:
    """The finished parts of one run, in `<target>.partial` beside what is to be written; to be used within `run_lock`.

    Several processes of one run may have a store each; one of them has the lock.

    Args:
        target: What is to be written.
        facts: Everything that the parts depend on, in plain values.
        began: When the run began, on `time.monotonic`'s clock; now for None.

    Raises:
        DLRError: Where the directory holds the parts of a run with other facts.
    """

    def __init__(self, target: Path, facts: dict[str, Any], began: float | None = None) -> None:
        self.folder = _folder(target)
        self._began = time.monotonic() if began is None else began
        self._about = json.dumps(facts, sort_keys=True, default=str)
        self._mine = uuid4().hex[:8]  # in the names of files that are not whole yet
        if self.folder.exists() and not (self.folder / _ABOUT).is_file():
            if not self.folder.is_dir() or any(
                not path.name.endswith(".part") for path in self.folder.iterdir()
            ):
                raise DLRError(f"{self.folder} is in the way and not of an interrupted run: move it away")
        elif self.folder.exists() and not self.count:
            (self.folder / _ABOUT).unlink(missing_ok=True)  # it was interrupted before its first part
        elif self.folder.exists():
            before = read_json(self.folder / _ABOUT)
            other = sorted(
                key for key in {*before, *facts} if before.get(key) != json.loads(self._about).get(key)
            )
            if other:
                raise DLRError(
                    f"{self.folder} keeps {self.count} finished parts of a run with other {', '.join(other)}: "
                    "run as then to go on with it, or delete it"
                )

        self._earlier = 0.0
        with suppress(DLRError, TypeError, ValueError):
            self._earlier = float(read_json(self.folder / _SPENT)["seconds"]) if self.count else 0.0

    @property
    def seconds(self) -> float:
        """What the work took: this run so far, and each earlier one up to its last finished part."""
        return self._earlier + time.monotonic() - self._began

    @property
    def count(self) -> int:
        """How many parts are there."""
        return _count(self.folder)

    def has(self, part: str) -> bool:
        """Whether a part is finished."""
        return self._path(part).is_file()

    def await_parts(self, parts: Iterable[str], seconds: float = 120.0) -> None:
        """Waits until parts that other processes have finished are seen here, too.

        A network's file system may show another machine's files late: NFS after up to 60 s.

        Raises:
            DLRError: Where they are not seen in so many seconds.
        """
        until = time.monotonic() + seconds
        while missing := [part for part in parts if not self.has(part)]:
            if time.monotonic() > until:
                raise DLRError(
                    f"{self.folder} does not show {missing[0]}, which another process has finished: the output must "
                    "be on a file system that all processes see"
                )
            time.sleep(0.05)
            with suppress(OSError):
                os.listdir(self.folder)  # asks for what is new

    def get(self, part: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A part's tensors and the figures kept with it; None where it is not finished."""
        figures = self.figures(part)
        if figures is None:
            return None
        path = self._path(part)
        try:
            return load_file(path), figures
        except SafetensorError as error:
            raise DLRError(f"{path} is damaged: delete it, and its part is done again") from error

    def figures(self, part: str) -> dict[str, Any] | None:
        """The figures kept with a part; None where it is not finished."""
        path = self._path(part)
        if not self.has(part):
            return None
        try:
            return read_json(path.with_suffix(".json"))
        except DLRError as error:
            raise DLRError(f"{path} is damaged: delete it, and its part is done again") from error

    def put(self, part: str, tensors: dict[str, Tensor], figures: dict[str, Any]) -> None:
        """Keeps a finished part: whole or not at all, whatever interrupts.

        Args:
            part: Its name.
            tensors: By name.
            figures: Plain values.

        Raises:
            DLRError: Where the disk is full, or another run writes to the same folder.
        """
        try:
            with full_disk_is_an_error(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                about = self.folder / _ABOUT
                # Where there are no locks, this is what keeps two runs from being mixed.
                if about.is_file() and about.read_text(encoding="utf-8") != self._about:
                    raise DLRError(f"another run is writing to {self.folder}: choose another output")
                path = self._path(part)
                for file, write in (
                    (about, lambda p: p.write_text(self._about, encoding="utf-8")),
                    (
                        path.with_suffix(".json"),
                        lambda p: p.write_text(json.dumps(figures), encoding="utf-8"),
                    ),
                    (
                        self.folder / _SPENT,
                        lambda p: p.write_text(json.dumps({"seconds": self.seconds}), encoding="utf-8"),
                    ),
                    (path, lambda p: save_file(tensors, p)),  # last: it is what says that the part is there
                ):
                    unfinished = file.with_name(f"{file.name}.{self._mine}.part")
                    write(unfinished)
                    os.replace(unfinished, file)
        except SafetensorError as error:
            raise DLRError(f"{self.folder} cannot be written: {error}") from error

    def remove(self) -> None:
        """Gives the disk space back, once the whole is written. What is not ours stays."""
        for file in [
            *self.folder.glob("*.safetensors"),
            *self.folder.glob("*.json"),
            *self.folder.glob("*.part"),
        ]:
            if file.name != _CLAIM:  # which `run_lock` removes, and the folder with it
                file.unlink(missing_ok=True)

    def _path(self, part: str) -> Path:
        # A module's name may be longer than a file's can be.
        return self.folder / f"{hashlib.sha256(part.encode()).hexdigest()[:16]}.safetensors"


def _folder(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _count(folder: Path) -> int:
    return len(list(folder.glob("*.safetensors")))
