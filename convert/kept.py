"""What a conversion keeps as it goes: every finished module, so that an interruption costs one at most."""

import hashlib
import json
import os
import shutil
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
        if (self.folder / _ABOUT).is_file():
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
        """Gives the disk space back, once the checkpoint is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, module: str) -> Path:
        # A module's name may be longer than a file's can be.
        return self.folder / f"{hashlib.sha256(module.encode()).hexdigest()[:16]}.safetensors"
