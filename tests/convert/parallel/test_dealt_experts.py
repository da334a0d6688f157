"""Mixtures converted by several processes: whole, or expert by expert where modules correct one another."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from launched import Launched, command
from parallel_runs import make_source, options, same_bits, words

from dlr_lock import convert_model
from dlr_lock.convert.activations import capture
from dlr_lock.convert.experts import pairs
from dlr_lock.convert.parallel import share
from dlr_lock.runtime import verify

FEW: dict[str, Any] = {"tokens": 3072, "train_tokens": 2048, "expert_tokens": 640, "end_to_end": 0}


def by_sequence(*given: str) -> None:
    """A conversion that leads one sequence through the layers at a time: so products have the same tokens, and round
    alike, however many processes there are. Rows go to whoever fits them in many exchanges."""
    capture.BATCH_TOKENS = pairs._ROWS = 128
    share._ROWS = 300
    command(*given)


def made(size: int, given: list[str], log: Path) -> dict[str, Any]:
    """What so many processes made, as the manifest has it, but for the time."""
    run = Launched(size, by_sequence, *given, log=log)
    assert run.ended() == [0] * size, run.said()
    assert "written to" in run.said()[0] and not any(run.said()[1:])
    found = facts(Path(given[2]))
    assert verify(given[2]) == []
    return found


def facts(out: Path) -> dict[str, Any]:
    found = json.loads((out / "dlr_manifest.json").read_text())["conversion"]
    modules = [{**module, "seconds": 0} for module in found["modules"]]
    return {name: found[name] for name in ("evaluation", "warnings", "across")} | {"modules": modules}


def test_experts_dealt_out_have_the_bits_of_one_process_also_after_a_kill(tmp_path: Path) -> None:
    """Every chain, figure and note, the starved experts' and the attack's among them."""
    make_source(tmp_path, "mixtral", layers=2)
    one, two, again = ([*words(tmp_path, tmp_path / n, "sequential", **FEW)] for n in ("one", "two", "again"))
    alone = made(1, one, tmp_path / "log")
    assert made(2, two, tmp_path / "log") == alone and same_bits(tmp_path / "one", tmp_path / "two")
    assert alone["across"] == "sequential" and all(module["redistillation"] for module in alone["modules"])
    said = "".join(alone["warnings"])
    assert "were fitted on those their router scores highest for, too" in said and "was on expert" in said
    run = Launched(2, by_sequence, *again, log=tmp_path / "log")
    until = time.monotonic() + 60
    while not list((tmp_path / "again.partial").glob("*.safetensors")):
        assert time.monotonic() < until
        time.sleep(0.01)
    run.kill(1)
    assert run.ended() == [2, -9] and len(run.lines()) == 1, run.said()
    assert made(2, again, tmp_path / "log") == alone and same_bits(tmp_path / "one", tmp_path / "again")


def test_more_processes_than_experts_with_activations_on_the_disk(tmp_path: Path) -> None:
    """And starved experts that stay as they are."""
    make_source(tmp_path, "mixtral", layers=2)
    more = FEW | {
        "max_memory": "1MiB",
        "starved": "leave",
        "layers": "1",
        "redistill": 0.0,
        "expert_tokens": 1500,
    }
    one, five = ([*words(tmp_path, tmp_path / n, "sequential", **more)] for n in ("one", "five"))
    alone = made(1, one, tmp_path / "log")
    assert made(5, five, tmp_path / "log") == alone and same_bits(tmp_path / "one", tmp_path / "five")
    assert any("stay as they are" in note for note in alone["warnings"])


def test_mlps_beside_experts_are_divided_by_their_tokens(tmp_path: Path) -> None:
    """A dense layer, experts and the shared expert beside them: one process' but for rounding."""
    make_source(tmp_path, "deepseek_v3", layers=2)
    for size in (1, 2):
        given = words(tmp_path, tmp_path / str(size), "sequential", **FEW | {"redistill": 0.0})
        run = Launched(size, command, *given, log=tmp_path / "log")
        assert run.ended() == [0] * size, run.said()
    one, two = (facts(tmp_path / str(size)) for size in (1, 2))
    for ours, theirs in zip(two["modules"], one["modules"], strict=True):
        for figure in ("rel_error", "first_error", "drift", "coupling"):
            if theirs[figure] is not None:  # a drift is known behind the last module of a layer
                assert ours[figure] == pytest.approx(theirs[figure], rel=1e-3), (ours, theirs)
    assert two["evaluation"]["kl"] == pytest.approx(one["evaluation"]["kl"], rel=1e-3)
    assert two["warnings"] == one["warnings"] and len(one["modules"]) == 3


def test_mixtures_dealt_out_whole_have_the_bits_of_one_process(tmp_path: Path) -> None:
    make_source(tmp_path, "mixtral", layers=2)
    more = {"expert_tokens": 256, "redistill": 0.0}
    given = words(tmp_path, tmp_path / "out", "independent", **more)
    assert Launched(2, command, *given, log=tmp_path / "log").ended() == [0, 0]
    convert_model(tmp_path / "source", tmp_path / "one", **options(tmp_path, "independent", **more))
    assert same_bits(tmp_path / "out", tmp_path / "one")
