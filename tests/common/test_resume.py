"""A conversion that was interrupted goes on where it stopped, and only as the same conversion."""

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny

from dlr_lock import ConversionReport, DLRError, convert_model
from dlr_lock.common.files import read_json
from dlr_lock.common.resume import ResumeStore
from dlr_lock.convert.config import Recipe
from dlr_lock.convert.data import english_topics
from dlr_lock.convert.distill import distill

QUICK: dict[str, Any] = {
    "tokens": 2048,
    "heldout": 512,
    "train_tokens": 4096,
    "batch": 256,
    "depth": 3,
    "rank": 16,
}


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
    with pytest.raises(KeyboardInterrupt, match=r"2 finished parts are kept in .*out\.partial"):
        convert_model(tmp_path / "source", tmp_path / "out", progress=Stopper(3), **options)
    assert not (tmp_path / "out").exists()
    second = Stopper(0)
    report = convert_model(tmp_path / "source", tmp_path / "out", progress=second, **options)
    assert len(second.distilled) == 1 and len(report.modules) == 3
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "topics.txt", "whole"]


def test_it_does_not_go_on_with_modules_of_another_recipe(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path / "source")
    arguments, options = (tmp_path / "source", tmp_path / "out"), QUICK | {"data": text}
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr("dlr_lock.convert.config.Recipe", partial(Recipe, lr_multiplier_b=1.5))
        convert_model(*arguments, progress=Stopper(2), **options)
    with pytest.raises(DLRError, match="keeps 1 finished parts of a run with other recipe"):
        convert_model(*arguments, **options)


def test_what_a_module_has_to_say_is_still_said_after_an_interruption(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path / "source")
    arguments, options = (tmp_path / "source", tmp_path / "out"), QUICK | {"data": text}

    def noting(*args: Any, note: Callable[[str], object], name: str, **named: Any) -> dict[str, torch.Tensor]:
        note(f"something about {name}")
        return distill(*args, note=note, name=name, **named)

    monkeypatch.setattr("dlr_lock.convert.pipeline.distill", noting)
    with pytest.raises(KeyboardInterrupt):
        convert_model(*arguments, progress=Stopper(2), **options)
    report = convert_model(*arguments, **options)
    said = [warning for warning in report.warnings if warning.startswith("something about")]
    assert said == [f"something about model.layers.{i}.mlp" for i in (0, 1)]


def test_an_attack_that_failed_is_tried_again_and_then_not_said(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path / "source")
    arguments, options = (tmp_path / "source", tmp_path / "out"), QUICK | {"data": text, "redistill": 0.5}

    def failing(*args: Any, **named: Any) -> None:
        raise DLRError("no luck")

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr("dlr_lock.convert.pipeline.attack_module", failing)
        convert_model(*arguments, progress=Stopper(2), **options)
    report = convert_model(*arguments, **options)
    assert all(module.redistillation for module in report.modules)
    assert not any("the attack on" in warning for warning in report.warnings)


def test_two_conversions_do_not_write_to_one_output(text: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    arguments = (tmp_path / "source", tmp_path / "made" / "out")
    refused: list[str] = []

    def second(what: str, done: int, total: int) -> None:
        if what.startswith("distilling") and not refused:
            with pytest.raises(DLRError, match="another run is writing to") as raised:
                convert_model(*arguments, data=text, **QUICK | {"seed": 1})
            refused.append(str(raised.value))

    report = convert_model(*arguments, data=text, progress=second, **QUICK)
    assert len(report.modules) == 2 and "\n" not in refused[0]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["out"]


def test_without_locks_the_slower_of_two_conversions_fails(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path / "source")
    monkeypatch.setattr("dlr_lock.common.files.fcntl", None)
    arguments = (tmp_path / "source", tmp_path / "out")
    faster: list[ConversionReport] = []

    def second(what: str, done: int, total: int) -> None:
        if what.startswith("distilling") and not faster:
            faster.append(convert_model(*arguments, data=text, **QUICK | {"seed": 1}))

    with pytest.raises(DLRError, match="exists; choose another output"):
        convert_model(*arguments, data=text, progress=second, **QUICK)
    assert read_json(tmp_path / "out" / "dlr_manifest.json")["conversion"]["options"]["seed"] == 1


def test_a_conversion_that_keeps_nothing_leaves_nothing(text: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        convert_model(tmp_path / "source", tmp_path / "made" / "out", data=text, progress=Stopper(1), **QUICK)
    assert not (tmp_path / "made").exists()


def test_other_choices_do_not_mix(text: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        convert_model(tmp_path / "source", tmp_path / "out", progress=Stopper(2), data=text, **QUICK)
    with pytest.raises(DLRError, match=r"1 finished parts .* other seed:"):
        convert_model(tmp_path / "source", tmp_path / "out", data=text, seed=1, **QUICK)
    assert (tmp_path / "out.partial").is_dir()  # nothing lost
    convert_model(tmp_path / "source", tmp_path / "out", data=text, **QUICK)
    assert not (tmp_path / "out.partial").exists()


def test_a_folder_that_is_not_ours_is_left_alone(text: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("ten years of work")
    with pytest.raises(DLRError, match="in the way"):
        convert_model(tmp_path / "source", tmp_path / "out", data=text, **QUICK)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "ten years of work"


def test_an_attack_that_fails_costs_no_module(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path / "source")

    def fail(*args: object, **named: object) -> None:
        raise DLRError("the copy diverged")

    monkeypatch.setattr("dlr_lock.convert.redistill.redistill", fail)
    report = convert_model(tmp_path / "source", tmp_path / "out", data=text, redistill=0.5, **QUICK)
    assert [m.redistillation for m in report.modules] == [None, None]
    assert sum("the copy diverged" in warning for warning in report.warnings) == 2


def test_the_attack_can_be_asked_for_when_going_on(text: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        convert_model(
            tmp_path / "source", tmp_path / "out", progress=Stopper(2), data=text, redistill=0, **QUICK
        )
    second = Stopper(0)
    report = convert_model(
        tmp_path / "source", tmp_path / "out", progress=second, data=text, redistill=0.5, **QUICK
    )
    assert len(second.distilled) == 1
    assert all(m.redistillation is not None and m.redistillation.cost == 0.5 for m in report.modules)


def test_the_command_line_says_what_is_kept(text: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    arguments = [
        "convert",
        str(tmp_path / "source"),
        str(tmp_path / "out"),
        "--data",
        text,
        "--tokens",
        "2048",
    ]
    # Layer 0 in a moment, layer 1 not in a lifetime: a process that is stopped in the middle of the second.
    script = (
        "import sys, dlr_lock.cli as cli, dlr_lock.convert.pipeline as modules\n"
        "fit = modules.distill\n"
        "def stop(*args, name, **named):\n"
        "    if '.1.' in name: raise KeyboardInterrupt\n"
        "    return fit(*args, name=name, **named)\n"
        "modules.distill = stop\n"
        "cli.main()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--train-tokens", "2048", "--redistill", "0"],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("dlr-lock: interrupted; 1 finished parts are kept in ")


def test_a_damaged_module_is_made_again_or_named(text: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        convert_model(tmp_path / "source", tmp_path / "out", progress=Stopper(2), data=text, **QUICK)
    module = next((tmp_path / "out.partial").glob("*.safetensors"))
    module.write_bytes(module.read_bytes()[:100])
    with pytest.raises(DLRError, match="damaged"):
        convert_model(tmp_path / "source", tmp_path / "out", data=text, **QUICK)


def test_a_duration_has_what_earlier_runs_took(tmp_path: Path) -> None:
    first = ResumeStore(tmp_path / "out", {"seed": 0}, time.monotonic() - 100)
    first.put("a", {}, {})
    again = ResumeStore(tmp_path / "out", {"seed": 0}, time.monotonic() - 20)
    assert 120 <= again.seconds < 140
    again.put("b", {}, {})
    assert 120 <= ResumeStore(tmp_path / "out", {"seed": 0}).seconds < 140
    again.remove()
    assert list((tmp_path / "out.partial").iterdir()) == []
    assert ResumeStore(tmp_path / "out", {"seed": 0}).seconds < 20  # nothing is kept: a new run
