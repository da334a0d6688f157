"""What a conversion foretells of its layers, and those that it chooses by that."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny, tiny_model, tiny_tokenizer

from dlr_lock import DLRError, convert_model
from dlr_lock.common.progress import Phase
from dlr_lock.convert.data import english_topics
from dlr_lock.convert.outlook import phases, sensitivity

CHOICES: dict[str, Any] = {
    "tokens": 2048, "heldout": 512, "train_tokens": 2048, "batch": 256, "depth": 3, "rank": 16, "device": "cpu",
    "redistill": 0.0, "sequence": 128,
}  # fmt: skip


class Heard:
    """A progress that keeps what it was told."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.said: list[str] = []
        self.work: dict[str, float] = {}

    def expect(self, phases: list[Phase]) -> None:
        self.work = self.work or {phase.name: phase.work for phase in phases}

    def say(self, sentence: str) -> None:
        self.said.append(sentence)

    def __call__(self, what: str, done: int, total: int) -> None:
        self.begun.append(what)

    @property
    def foretold(self) -> bool:
        return any(what.startswith("foretelling") for what in self.begun)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Of its four layers the first and the third write little."""
    (tmp_path / "topics.txt").write_text(english_topics()[:40_000], encoding="utf-8")
    model = tiny_model("llama", layers=4)
    with torch.no_grad():
        for layer in (0, 2):
            model.model.layers[layer].mlp.down_proj.weight.mul_(0.1)
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_the_layers_that_cost_least_are_locked_and_named(source: Path, tmp_path: Path) -> None:
    heard = Heard()
    choices = CHOICES | {"data": str(tmp_path / "topics.txt")}
    report = convert_model(source, tmp_path / "out", layers="auto:2", progress=heard, **choices)
    assert [m.layer for m in report.modules] == [0, 2] and report.options["layers"] == "0,2"
    assert report.foretold is not None and [c.layer for c in report.foretold.layers] == [0, 2]
    assert any("chose 0,2, which of 4 layers cost the model least" in sentence for sentence in heard.said)
    assert heard.work["foretelling"] > 0  # in the time left from the beginning
    assert any(report.foretold.words in sentence for sentence in heard.said)
    made = json.loads((tmp_path / "out" / "dlr_manifest.json").read_text())["conversion"]
    assert made["options"]["layers"] == "0,2" and made["foretold"]["kl"] == report.foretold.kl
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| {report.foretold.kl_words} |" in card and "; layers 0,2, " in card and "chose 0,2" in card
    named = convert_model(source, tmp_path / "named", layers="0,2", **choices)
    assert named.evaluation == report.evaluation and named.foretold is None


def test_an_interrupted_conversion_goes_on_with_its_choice(source: Path, tmp_path: Path) -> None:
    class Stopped(Heard):
        def __call__(self, what: str, done: int, total: int) -> None:
            super().__call__(what, done, total)
            if what.startswith("distilling model.layers.2.mlp"):
                raise KeyboardInterrupt

    choices = CHOICES | {"data": str(tmp_path / "topics.txt"), "layers": "auto:2"}
    first, second = Stopped(), Heard()
    with pytest.raises(KeyboardInterrupt):
        convert_model(source, tmp_path / "out", progress=first, **choices)
    with pytest.raises(DLRError, match="other layers"):
        convert_model(source, tmp_path / "out", **choices | {"layers": "auto:3"})
    report = convert_model(source, tmp_path / "out", progress=second, **choices)
    assert first.foretold and not second.foretold
    assert not any(what.startswith("distilling model.layers.0.mlp") for what in second.begun)
    assert report.options["layers"] == "0,2" and report.foretold is not None


def test_an_mlp_that_does_nothing_is_not_chosen(source: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", layers=4)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    model.save_pretrained(source)
    choices = CHOICES | {"data": str(tmp_path / "topics.txt")}
    report = convert_model(source, tmp_path / "out", layers="auto:3", **choices)
    assert [m.layer for m in report.modules] == [0, 2, 3]
    with pytest.raises(DLRError, match="auto:4: of 4 layers 3 have an MLP that does anything"):
        convert_model(source, tmp_path / "all", layers="auto:4", **choices)


def test_a_mixture_has_its_layers_named(tmp_path: Path) -> None:
    (tmp_path / "topics.txt").write_text(english_topics()[:40_000], encoding="utf-8")
    save_tiny("mixtral", tmp_path / "source")
    heard = Heard()
    with pytest.raises(DLRError, match=r"--layers auto:1: .* mixtures of experts, as .* is one"):
        convert_model(
            tmp_path / "source", tmp_path / "out", layers="auto:1", progress=heard,
            data=str(tmp_path / "topics.txt"), **CHOICES,
        )  # fmt: skip
    assert set(heard.begun) == {"reading the model"}


def test_what_is_foretold_unasked_changes_nothing_and_may_fail(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = CHOICES | {"data": str(tmp_path / "topics.txt"), "layers": "1-2"}
    plain = convert_model(source, tmp_path / "plain", **choices)
    monkeypatch.setattr(phases, "_FORETELLING", 1e3)  # of so small a conversion it is most of the work
    rough = convert_model(source, tmp_path / "rough", **choices)
    assert rough.foretold is None  # nobody measured such fits
    monkeypatch.setattr(phases, "measured", lambda train_tokens: True)
    monkeypatch.setattr(phases, "_OWN_SIZE", 1e3)
    told = convert_model(source, tmp_path / "told", **choices)
    assert plain.foretold is None and told.foretold is not None
    assert told.evaluation == plain.evaluation and told.warnings == plain.warnings
    assert [c.layer for c in told.foretold.layers] == [1, 2]
    monkeypatch.setattr(sensitivity._Watched, "_slope", _out_of_memory)
    failed = convert_model(source, tmp_path / "failed", **choices)
    assert failed.foretold is None and failed.evaluation == plain.evaluation
    assert any("foretold: a backward pass failed: out of memory" in warning for warning in failed.warnings)
    with pytest.raises(DLRError, match="a backward pass failed"):
        convert_model(source, tmp_path / "chosen", **choices | {"layers": "auto:2"})


def _out_of_memory(self: Any, gradient: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("out of memory")
