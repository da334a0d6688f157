"""`dlr-lock bench model --engine vllm`: both models alive at once, each in an engine of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import save_locked
from servers import ENVIRONMENT, family, gone
from tiny import tiny_model

GROUPED = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
SIZES = ("--prompt", "12", "--new-tokens", "24", "--batches", "1,3", "--repeats", "2")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("speed")
    save_locked("llama", folder / "locked", **GROUPED)
    tiny_model("llama", **GROUPED).save_pretrained(folder / "original")
    program = [sys.executable, "-m", "dlr_lock", "bench", "model", str(folder / "locked")]
    return [*program, "--original", str(folder / "original"), "--engine", "vllm", "--eager"]


def start(command: list[str], *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
        env=os.environ | ENVIRONMENT,
    )  # fmt: skip


def test_figures_are_those_of_runs_in_turns(command: list[str]) -> None:
    process = start(command, *SIZES, "--json")
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-4000:]
    document = json.loads(out)
    assert document["settings"]["engine"] == "vllm" and document["versions"]["vllm"]
    turns = [(run["batch"], run["side"]) for run in document["runs"]]
    there, back = ("locked", "original"), ("original", "locked")
    assert turns == [(batch, side) for batch in (1, 3) for order in (there, back, there) for side in order]
    for row in document["rows"]:
        own = [
            r
            for r in document["runs"]
            if r["counts"] and (r["batch"], r["side"]) == (row["batch"], row["side"])
        ]
        mean = sum(r["first_token_s"] for r in own) / 2  # the median of two
        assert row["first_token_s"][1] == pytest.approx(mean) and row["error_message"] is None
        assert row["peak_bytes"] == max(r["peak_bytes"] for r in own) > 100e6  # a process with torch in it
    assert [row["decode_ratio"] for row in document["rows"] if row["side"] == "original"] == [1, 1]


def test_an_engine_that_dies_ends_it_in_a_line(command: list[str]) -> None:
    process = start(command, *SIZES)
    end = time.monotonic() + 120
    while not (workers := family(process.pid) - {process.pid}) and time.monotonic() < end:
        time.sleep(0.2)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    (line,) = [line for line in err.splitlines() if line.startswith("dlr-lock: ")]
    assert process.returncode == 2 and out == "" and "Traceback" not in err
    assert line.startswith("dlr-lock: vLLM with the locked model was killed by SIGKILL")
    assert gone(workers) == set()


def test_what_vllm_refuses_is_said_in_its_own_words(command: list[str]) -> None:
    process = start(command, "--prompt", "200", "--batches", "1000000")
    out, err = process.communicate(timeout=300)
    line = err.splitlines()[-1]
    assert process.returncode == 2 and out == "" and "Traceback" not in err
    assert line.startswith("dlr-lock: vLLM does not start with the locked model: ")
    assert "max_num_seqs (1000000)" in line and "errors.pydantic" not in line


def test_a_checkpoint_that_is_not_what_was_written_starts_no_engine(command: list[str]) -> None:
    tokenizer = Path(command[5]) / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text + " ")
    try:
        _, err = (process := start(command, *SIZES)).communicate(timeout=120)
    finally:
        tokenizer.write_text(text)
    assert process.returncode == 2 and err.count("\n") == 1
    assert "is not what was written: tokenizer.json" in err
