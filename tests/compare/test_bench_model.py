"""Whole models timed in turns: every figure follows from the runs, which are all there. Times are no test."""

import json
import sys
from pathlib import Path

import pytest
import torch
from locked import locked_tiny
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from dlr_lock.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speed")
    save_tiny("llama", folder / "source")
    torch.manual_seed(0)
    locked_tiny("llama").save_pretrained(folder / "out")
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> tuple[int, str, str]:
        given = [a.replace("{}", str(folder)) for a in arguments]
        monkeypatch.setattr(sys, "argv", ["dlr-lock", "bench", "model", *given])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capfd.readouterr()
        return ended.value.code, shown.out, (shown.err.strip().splitlines() or [""])[-1]

    return run


BOTH = ("{}/out", "--original", "{}/source", "--device", "cpu", "--prompt", "12", "--new-tokens", "5")


def test_figures_are_those_of_runs_in_turns(run, folder: Path) -> None:
    status, out, err = run(*BOTH, "--batches", "2,1", "--repeats", "3", "--json")
    assert status == 0, err
    document = json.loads(out)
    assert {"device", "cpu_threads", "program", "versions", "date"} <= set(document)
    assert document["settings"] == {
        "engine": "transformers", "prompt": 12, "new_tokens": 5, "batches": [2, 1], "repeats": 3, "dtype": "float32",
        "eager": False,
    }  # fmt: skip
    turns = [(r["batch"], r["side"], r["counts"]) for r in document["runs"]]
    there, back = ("locked", "original"), ("original", "locked")
    assert turns == [
        (batch, side, turn > 0)
        for batch in (2, 1)
        for turn, order in enumerate((there, back, there, back))
        for side in order
    ]
    rows = document["rows"]
    assert [(row["batch"], row["side"]) for row in rows] == [(b, s) for b in (2, 1) for s in there]
    for row in rows:
        runs = [
            r
            for r in document["runs"]
            if r["counts"] and (r["batch"], r["side"]) == (row["batch"], row["side"])
        ]
        first = sorted(r["first_token_s"] for r in runs)
        decode = sorted(r["decode_s"] for r in runs)
        assert row["first_token_s"][1] == first[1] > 0 and decode[0] > 0
        assert row["prefill_tokens_per_s"][1] == pytest.approx(row["batch"] * 12 / first[1])
        assert row["decode_tokens_per_s"][1] == pytest.approx(row["batch"] * 4 / decode[1])
        model = AutoModelForCausalLM.from_pretrained(
            folder / ("out" if row["side"] == "locked" else "source")
        )
        assert row["weights_bytes"] == sum(p.nbytes for p in model.parameters()) <= row["peak_bytes"]
        assert row["error_message"] is None
    for ours, theirs in (rows[:2], rows[2:]):
        for name in ("decode", "prefill"):
            ratio = ours[f"{name}_tokens_per_s"][1] / theirs[f"{name}_tokens_per_s"][1]
            assert ours[f"{name}_ratio"] == pytest.approx(ratio) and theirs[f"{name}_ratio"] == 1


def test_the_table_has_both_models(run) -> None:
    status, out, err = run(*BOTH, "--batches", "1", "--repeats", "1")
    assert status == 0, err
    cells = [line.split() for line in out.splitlines()]
    (ours,) = (row for row in cells if row[:2] == ["1", "locked"])
    (theirs,) = (row for row in cells if row[:2] == ["1", "original"])
    assert ours.count("±") == theirs.count("±") == 3 and "-" in theirs and "-" not in ours


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("{}/nowhere", "--original", "{}/source", "--new-tokens", "1"), "--new-tokens must be from 2"),
        (("{}/nowhere", "--original", "{}/source", "--prompt", "0"), "--prompt must be from 1"),
        (("{}/nowhere", "--original", "{}/source", "--batches", "1,x"), "no list of whole numbers"),
        (("{}/nowhere", "--original", "{}/source", "--repeats", "0"), "--repeats must be from 1"),
        (("{}/nowhere", "--original", "{}/source"), "nowhere"),
        (("{}/out",), "--original"),
        (("{}/out", "--original", "{}/source", "--device", "cpu", "--prompt", "9999"), "takes 256"),
    ],
)
def test_mistakes_end_in_one_line_and_status_two(arguments: tuple[str, ...], says: str, run) -> None:
    status, out, line = run(*arguments)
    assert status == 2 and out == "" and line.startswith("dlr-lock: ") and says in line
