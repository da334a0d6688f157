"""A long conversion watched: TensorBoard's scalars, and the time left of what is still to compute."""

import builtins
import math
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny

from dlr_lock import DLRError, convert_model
from dlr_lock.common.progress import Phase
from dlr_lock.convert.data import english_topics
from dlr_lock.convert.end_to_end import EndToEndPlan

CHOICES: dict[str, Any] = {
    "tokens": 2048, "heldout": 512, "train_tokens": 4096, "batch": 256, "depth": 3, "rank": 16, "device": "cpu",
    "redistill": 0.25, "sequence": 128,
}  # fmt: skip


watched = pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs dlr-lock[log]")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "topics.txt").write_text(english_topics()[:40_000], encoding="utf-8")
    return save_tiny("llama", tmp_path / "source", layers=3)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, as TensorBoard reads them."""
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    read = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


@watched
def test_scalars_are_those_of_the_report(source: Path, tmp_path: Path) -> None:
    report = convert_model(
        source, tmp_path / "out", data=str(tmp_path / "topics.txt"), log_dir=tmp_path / "log", end_to_end=1024,
        layers="1-2", **CHOICES,
    )  # fmt: skip
    found = scalars(tmp_path / "log")
    for m in report.modules:
        tag = f"{m.layer:03}-{m.module}"
        assert found[f"error/{tag}"] == [(4096, pytest.approx(m.fidelity.rel_error))]
        assert found[f"flatten_gap/{tag}"] == [(4096, pytest.approx(m.fidelity.flatten_gap))]
        training = found[f"training_error/{tag}"]
        assert len(training) == 2 and training[-1] == (4096, pytest.approx(m.fidelity.rel_error, rel=0.5))
        rates, speeds = (found[f"{name}/{tag}"] for name in ("learning_rate", "tokens_per_second"))
        assert 0 < rates[-1][1] < rates[0][1] < 0.0121 and all(speed > 0 for _, speed in speeds)
    assert found["layers/error"] == [(m.layer, pytest.approx(m.fidelity.rel_error)) for m in report.modules]
    assert [step for step, _ in found["layers/student_over_chain"]] == [1, 2]
    kl = [value for _, value in found["model/kl"]]
    assert kl[-1] == pytest.approx(report.evaluation.to_dict()["kl"])
    losses = found["end-to-end/training_loss"]
    assert losses[-1][0] >= 1024 and all(math.isfinite(loss) for _, loss in losses)
    # a first step at the peak, which goes with the root of what the modules left
    peak = EndToEndPlan(1024).rate * math.sqrt(kl[0])
    assert found["end-to-end/learning_rate"][0][1] == pytest.approx(peak, rel=1e-3)
    assert [p.name for p in (tmp_path / "out").rglob("*tfevents*")] == []
    assert str(tmp_path / "log") not in (tmp_path / "out" / "dlr_manifest.json").read_text()


@watched
def test_an_interrupted_run_goes_on_in_the_same_log(source: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("distilling model.layers.2.mlp"):
            raise KeyboardInterrupt

    choices = CHOICES | {"data": str(tmp_path / "topics.txt"), "log_dir": tmp_path / "log", "redistill": 0.0}
    with pytest.raises(KeyboardInterrupt):
        convert_model(source, tmp_path / "out", progress=stop, **choices)
    report = convert_model(source, tmp_path / "out", **choices)
    found = scalars(tmp_path / "log")
    for m in report.modules:
        assert found[f"error/{m.layer:03}-{m.module}"][-1] == (4096, pytest.approx(m.fidelity.rel_error))


@pytest.mark.parametrize(
    ("folder", "words"),
    [("log", "pip install 'dlr-lock\\[log\\]'"), ("out/log", "which a conversion replaces")],
)
def test_a_log_that_cannot_be_is_refused_before_the_work(
    folder: str, words: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    begun: list[str] = []
    with pytest.raises(DLRError, match=words):
        convert_model(
            source, tmp_path / "out", log_dir=tmp_path / folder, progress=lambda what, *_: begun.append(what)
        )
    assert begun == [] and not (tmp_path / "out").exists()


class Heard:
    """A progress that counts how often each kind of work is begun, beside what it was told of it."""

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}
        self.begun: dict[str, int] = defaultdict(int)
        self.first: list[str] | None = None
        self._at: dict[str, tuple[str, int]] = {}

    def expect(self, phases: list[Phase]) -> None:
        self.first = self.first or [phase.name for phase in phases]
        self.phases |= {phase.name: phase for phase in phases}

    def __call__(self, what: str, done: int, total: int) -> None:
        for name in self.phases:
            if what.startswith(name):
                before = self._at.get(name)
                self.begun[name] += before is None or before[0] != what or done < before[1]
                self._at[name] = what, done


@pytest.mark.parametrize(
    ("arch", "choices"),
    [("llama", {}), ("llama", {"across": "independent", "max_memory": "1MiB"}), ("llama", {"layers": "0,2"}),
     ("llama", {"layers": "auto:2"}),
     ("mixtral", {"redistill": 0.0, "expert_tokens": 64}), ("t5", {})],
)  # fmt: skip
def test_each_kind_of_work_is_begun_as_often_as_it_was_told(
    arch: str, choices: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    """By which a time left knows how far the whole is. What is expected is told before the text is read."""
    heard = Heard()
    save_tiny(arch, tmp_path / "other", layers=3)
    both = CHOICES | {"data": str(tmp_path / "topics.txt"), "end_to_end": 512 * (arch == "llama")} | choices
    convert_model(tmp_path / "other", tmp_path / "out", progress=heard, **both)
    assert heard.first is not None and heard.first[0] == "calibration text"
    told = {name: phase.times for name, phase in heard.phases.items() if phase.work}
    assert {name: heard.begun[name] for name in told} == told


def test_what_is_done_is_not_expected_again(source: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("redistilling model.layers.1.mlp"):
            raise KeyboardInterrupt

    whole, rest = Heard(), Heard()
    choices = CHOICES | {"data": str(tmp_path / "topics.txt")}
    with pytest.raises(KeyboardInterrupt):
        convert_model(source, tmp_path / "out", progress=stop, **choices)
    convert_model(source, tmp_path / "out", progress=rest, **choices)
    convert_model(source, tmp_path / "again", progress=whole, **choices)
    told = {name: phase.times for name, phase in rest.phases.items() if phase.work}
    assert {name: rest.begun[name] for name in told} == told
    share = {name: rest.phases[name].work / phase.work for name, phase in whole.phases.items() if phase.work}
    assert share["distilling"] == pytest.approx(1 / 3) and share["redistilling"] == pytest.approx(2 / 3)
    assert 0.5 < share["activations"] < 1 and share["measuring"] == 1
