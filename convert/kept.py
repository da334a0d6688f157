"""What a conversion keeps as it goes: every finished module, so that an interruption costs one at most."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..runtime import DLRError
from ..runtime.files import read_json

_ABOUT = "conversion.json"


class Kept:
    """The finished modules of one conversion, in `<target>.partial` beside the checkpoint to be.

    facts: everything that the modules depend on. Raises DLRError where the directory holds the modules of a
    conversion with other facts.
    """

    def __init__(self, target: Path, facts: dict[str, Any]) -> None:
        self.folder = target.with_name(f"{target.name}.partial")
        self._about = json.dumps(facts, sort_keys=True, default=str)
        if self.folder.exists() and not (self.folder / _ABOUT).is_file():
            if not self.folder.is_dir() or any(self.folder.iterdir()):
                raise DLRError(
                    f"{self.folder} is in the way and not of an interrupted conversion: move it away"
                )
        elif self.folder.exists():
            before = read_json(self.folder / _ABOUT)
            other = sorted(
                key for key in {*before, *facts} if before.get(key) != json.loads(self._about).get(key)
            )
            if other:
                raise DLRError(
                    f"{self.folder} keeps {self.count} modules of a conversion with other {', '.join(other)}: "
                    "convert as then to go on with it, or delete it"
                )

    @property
    def count(self) -> int:
        """How many modules are there."""
        return len(list(self.folder.glob("*.safetensors")))

    def get(self, module: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A module's tensors and the figures kept with it; None where it is not finished."""
        path = self._path(module)
        if not path.is_file():
            return None
        try:
            return load_file(path), read_json(path.with_suffix(".json"))
        except (SafetensorError, DLRError) as error:
            raise DLRError(f"{path} is damaged: delete it, and its module is distilled again") from error

    def put(self, module: str, tensors: dict[str, Tensor], figures: dict[str, Any]) -> None:
        """Keeps a finished module: whole or not at all, whatever interrupts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = self.folder / _ABOUT
        if about.is_file() and about.read_text(encoding="utf-8") != self._about:
            raise DLRError(f"another conversion is writing to {self.folder}: give this one another output")
        path = self._path(module)
        for file, write in (
            (self.folder / _ABOUT, lambda p: p.write_text(self._about, encoding="utf-8")),
            (path.with_suffix(".json"), lambda p: p.write_text(json.dumps(figures), encoding="utf-8")),
            (path, lambda p: save_file(tensors, p)),  # last: it is what says that the module is there
        ):
            part = file.with_name(f"{file.name}.part")
            write(part)
            os.replace(part, file)

    def remove(self) -> None:
        """Gives the disk space back, once the checkpoint is written. What is not ours stays."""
        for file in [
            *self.folder.glob("*.safetensors"),
            *self.folder.glob("*.json"),
            *self.folder.glob("*.part"),
        ]:
            file.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _path(self, module: str) -> Path:
        # A module's name may be longer than a file's can be.
        return self.folder / f"{hashlib.sha256(module.encode()).hexdigest()[:16]}.safetensors"
