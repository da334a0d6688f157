"""Small conversions that several processes do, and what they are compared by."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import save_tiny

from dlr_lock.convert.data import english_topics

OPTIONS: dict[str, Any] = {
    "tokens": 6144,
    "heldout": 384,
    "train_tokens": 4096,
    "batch": 256,
    "depth": 3,
    "rank": 16,
    "sequence": 128,
}


def make_source(folder: Path, arch: str = "llama", layers: int = 3) -> Path:
    """A model, which is returned, and a text beside it."""
    save_tiny(arch, folder / "source", layers=layers)
    (folder / "topics.txt").write_text(english_topics()[:40_000], encoding="utf-8")
    return folder / "source"


def options(folder: Path, across: str, **more: Any) -> dict[str, Any]:
    """The choices of a conversion, as `convert_model` takes them."""
    return (
        OPTIONS
        | {"data": str(folder / "topics.txt"), "across": across, "redistill": 0.25}
        | {"end_to_end": 8192 if across == "sequential" else 0}
        | more
    )


def words(folder: Path, out: Path, across: str, **more: Any) -> list[str]:
    """The same, as the command line takes them."""
    given = [str(folder / "source"), str(out)]
    for name, value in options(folder, across, **more).items():
        given += [f"--{name.replace('_', '-')}", str(value)]
    return ["convert", *given]


def same_bits(one: Path, two: Path) -> bool:
    """Whether two checkpoints have the same weights."""
    a, b = (load_file(path / "model.safetensors") for path in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
