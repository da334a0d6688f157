"""A conversion that was interrupted goes on where it stopped, and only as the same conversion."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny

from dlr_lock import DLRError, convert_model
from dlr_lock.convert.text import english_topics

QUICK: dict[str, Any] = {"tokens": 2048, "heldout": 512, "visits": 4096, "batch": 256, "depth": 3, "rank": 16}


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "topics.txt"
    path.write_text(english_topics()[:40_000], encoding="utf-8")
    return str(path)


class Stopper:
    """A progress that behaves like Ctrl-C once the module of a number is being distilled."""

    def __init__(self, module: int) -> None:
        self.module = module
        self.distilled: set[str] = set()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what.startswith("distilling"):
            self.distilled.add(what)
            if f"({self.module} of" in what and done > total // 2:
                raise KeyboardInterrupt


@pytest.mark.parametrize("across", ["sequential", "independent"])
def test_it_goes_on_to_the_same_checkpoint(across: str, text: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source", layers=3)
    options = QUICK | {"data": text, "across": across}
    convert_model(tmp_path / "source", tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt, match=r"2 of 3 modules are kept in .*out\.partial"):
        convert_model(tmp_path / "source", tmp_path / "out", progress=Stopper(3), **options)
    assert not (tmp_path / "out").exists()
    second = Stopper(0)
    report = convert_model(tmp_path / "source", tmp_path / "out", progress=second, **options)
    assert len(second.distilled) == 1 and len(report.modules) == 3
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "topics.txt", "whole"]


def test_other_choices_do_not_mix(text: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        convert_model(tmp_path / "source", tmp_path / "out", progress=Stopper(2), data=text, **QUICK)
    with pytest.raises(DLRError, match=r"1 modules .* other seed:"):
        convert_model(tmp_path / "source", tmp_path / "out", data=text, seed=1, **QUICK)
    assert (tmp_path / "out.partial").is_dir()  # nothing lost
    convert_model(tmp_path / "source", tmp_path / "out", data=text, **QUICK)
    assert not (tmp_path / "out.partial").exists()


def test_a_damaged_module_is_made_again_or_named(text: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        convert_model(tmp_path / "source", tmp_path / "out", progress=Stopper(2), data=text, **QUICK)
    module = next((tmp_path / "out.partial").glob("*.safetensors"))
    module.write_bytes(module.read_bytes()[:100])
    with pytest.raises(DLRError, match="damaged"):
        convert_model(tmp_path / "source", tmp_path / "out", data=text, **QUICK)
