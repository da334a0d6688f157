"""What long work keeps as it goes: every finished part, so that an interruption costs one at most."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..runtime import DLRError
from ..runtime.files import exclusive, full_disk_is_an_error, read_json

_ABOUT = "run.json"
_CLAIM = "claimed.part"  # no part of a run, as the name says


class Kept:
    """The finished parts of one run, in `<target>.partial` beside what is to be written.

    facts: everything that the parts depend on. Raises DLRError where the directory holds the parts of a run with other
    facts.
    """

    def __init__(self, target: Path, facts: dict[str, Any]) -> None:
        self.folder = target.with_name(f"{target.name}.partial")
        self._about = json.dumps(facts, sort_keys=True, default=str)
        if self.folder.exists() and not (self.folder / _ABOUT).is_file():
            if not self.folder.is_dir() or any(
                not path.name.endswith(".part") for path in self.folder.iterdir()
            ):
                raise DLRError(f"{self.folder} is in the way and not of an interrupted run: move it away")
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

    @property
    def count(self) -> int:
        """How many parts are there."""
        return len(list(self.folder.glob("*.safetensors")))

    def get(self, part: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A part's tensors and the figures kept with it; None where it is not finished."""
        path = self._path(part)
        if not path.is_file():
            return None
        try:
            return load_file(path), read_json(path.with_suffix(".json"))
        except (SafetensorError, DLRError) as error:
            raise DLRError(f"{path} is damaged: delete it, and its part is done again") from error

    def put(self, part: str, tensors: dict[str, Tensor], figures: dict[str, Any]) -> None:
        """Keeps a finished part: whole or not at all, whatever interrupts. Raises DLRError where the disk is full."""
        try:
            with full_disk_is_an_error(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self._path(part)
                for file, write in (
                    (self.folder / _ABOUT, lambda p: p.write_text(self._about, encoding="utf-8")),
                    (
                        path.with_suffix(".json"),
                        lambda p: p.write_text(json.dumps(figures), encoding="utf-8"),
                    ),
                    (path, lambda p: save_file(tensors, p)),  # last: it is what says that the part is there
                ):
                    unfinished = file.with_name(f"{file.name}.part")
                    write(unfinished)
                    os.replace(unfinished, file)
        except SafetensorError as error:
            raise DLRError(f"{self.folder} cannot be written: {error}") from error

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """No other process has the folder while the block runs: raises DLRError where one has. A Ctrl-C in the block
        says what is kept of the run."""
        made = [parent for parent in self.folder.parents if not parent.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with exclusive(
                self.folder / _CLAIM, f"another run is writing to {self.folder}: choose another output"
            ):
                try:
                    yield
                finally:
                    if not self.count:
                        self.remove()
        except KeyboardInterrupt as stop:
            if not self.count:
                raise
            raise KeyboardInterrupt(
                f"interrupted; {self.count} finished parts are kept in {self.folder}: "
                "the same command goes on from there"
            ) from stop
        finally:
            with suppress(OSError):  # not empty: something is kept
                for parent in made:
                    parent.rmdir()

    def remove(self) -> None:
        """Gives the disk space back, once the whole is written. What is not ours stays."""
        for file in [
            *self.folder.glob("*.safetensors"),
            *self.folder.glob("*.json"),
            *self.folder.glob("*.part"),
        ]:
            file.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _path(self, part: str) -> Path:
        # A module's name may be longer than a file's can be.
        return self.folder / f"{hashlib.sha256(part.encode()).hexdigest()[:16]}.safetensors"
