"""The benchmark as its readers rely on it: complete rows, no time for a wrong result, a reason for what is missing."""

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from dlr_lock.cli import app
from dlr_lock.common.errors import DLRError
from dlr_lock.microbench import bench, slot
from dlr_lock.microbench.bench import cases_of, chain_cases, numbers, run
from dlr_lock.microbench.explain import explain
from dlr_lock.microbench.slot import CPU_PROVIDERS, PROVIDERS
from dlr_lock.microbench.timing import Rates
from dlr_lock.triton_kernels import lookahead
from dlr_lock.triton_kernels.gpu import H200

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TIMES = ("median_us", "p20_us", "p80_us", "gb_per_s", "copy_percent", "tflop_per_s", "matmul_percent")


def tiny(tokens: tuple[int, ...] = (1, 3), device: torch.device = CPU, **options: Any) -> dict[str, Any]:
    cases = chain_cases(64, 96, depth=9, tokens=tokens)
    document = run(cases, device=device, rounds=2, cold_bytes=0, **options)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    return document


def by_name(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["provider"]: row for row in document["rows"]}


def assert_measured(row: dict[str, Any]) -> None:
    assert row["accurate"] and row["error_message"] is None and 0 < row["error"] <= row["error_limit"]
    assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
    assert all(row[name] > 0 for name in (*TIMES, "ratio_to_dense"))


def assert_no_time(row: dict[str, Any]) -> None:
    assert not row["accurate"]
    assert all(row[name] is None for name in (*TIMES, "ratio_to_dense", "launches"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_provider_has_a_row_a_case(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype == "bfloat16":  # whose products take a CPU seconds
        monkeypatch.setattr(bench, "measured_rates", lambda device, dtype: Rates(1e10, 1e11))
    saved: list[int] = []
    document = tiny(dtype=dtype, save=lambda d: saved.append(len(d["rows"])))
    assert saved == [4, 8, 8] and document["stopped"] is None
    assert document["schema"] == 1 and document["program"].startswith("dlr-lock ") and document["device"]
    assert {"python", "torch", "triton", "transformers"} <= set(document["versions"])
    assert all(rate > 0 for rate in document["measured_rates"].values())
    assert [(r["tokens"], r["provider"]) for r in document["rows"]] == [
        (tokens, provider) for tokens in (1, 3) for provider in CPU_PROVIDERS
    ]
    for row in document["rows"]:
        assert_measured(row)
        assert row["dtype"] == dtype and (row["lanes"], row["depth"], row["rank"]) == (1, 9, 16)
        assert (row["ratio_to_dense"] == 1) == (row["provider"] == "dense-eager")


def test_a_wrong_result_has_an_error_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "lookahead", lambda *args, **named: 1.001 * lookahead(*args, **named))
    rows = by_name(tiny((3,)))
    wrong = rows.pop("lookahead-eager")
    assert wrong["error"] == pytest.approx(1e-3, rel=0.01) and wrong["error_limit"] == 1e-5
    assert_no_time(wrong)
    for row in rows.values():
        assert_measured(row)


def test_a_failing_provider_has_a_message_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **named: Any) -> Tensor:
        raise RuntimeError("no kernel image\nsecond line")

    monkeypatch.setattr(slot, "lookahead", fail)
    rows = by_name(tiny((3,)))
    assert rows["lookahead-eager"]["error_message"] == "RuntimeError: no kernel image"
    assert_no_time(rows["lookahead-eager"])
    assert_measured(rows["naive-eager"])


def test_nan_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "lookahead", lambda x, *args, **named: x * float("nan"))
    row = by_name(tiny((1,)))["lookahead-eager"]
    assert row["error_message"] == "the output is not finite"
    assert_no_time(row)


def test_the_time_limit_keeps_what_was_measured() -> None:
    document = tiny(minutes=0)
    assert document["rows"] == [] and document["stopped"].startswith("after 0 of 2 cases")


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(DLRError, match="'dense-graph' wants a CUDA"):
        tiny(providers=["dense-graph"])
    with pytest.raises(DLRError, match="unknown provider 'fast'"):
        tiny(providers=["fast"])
    with pytest.raises(DLRError, match="unknown dtype 'int8'"):
        tiny(dtype="int8")
    with pytest.raises(DLRError, match="whole numbers"):
        numbers("1,many")
    with pytest.raises(DLRError, match="whole numbers"):
        numbers("1," + 5000 * "9")
    for shape, chain in (("576x1536", "1x" + 5000 * "9"), (5000 * "9" + "x64", "1"), ("576x1536x2", "1")):
        with pytest.raises(DLRError, match="is no"):
            cases_of(shape, chain, [1])
    for size in ({"lanes": 10**16}, {"depth": 10**23}, {"rank": 2**20}):
        with pytest.raises(DLRError, match="lanes, depth and rank"):
            chain_cases(64, 96, tokens=[1], **size)
    for sizes in ((0, 96), (64, -1), (64, 2**40)):
        with pytest.raises(DLRError, match="sizes are from 1"):
            chain_cases(*sizes, tokens=[1])
    for counts in ([1, 0], [], [10**22]):
        with pytest.raises(DLRError, match="token counts"):
            chain_cases(64, 96, tokens=counts)
    with pytest.raises(DLRError, match="allocate"):
        run(chain_cases(64, 96, tokens=[10**12]), device=CPU)


@pytest.mark.parametrize("sizes", [(576, 1536), (2048, 8192), (4096, 14336)])
@pytest.mark.parametrize(("lanes", "depth"), [(1, 64), (8, 64), (4, 32)])
def test_the_explanation_is_consistent(sizes: tuple[int, int], lanes: int, depth: int) -> None:
    cases = chain_cases(*sizes, lanes=lanes, depth=depth, tokens=[1, 64, 512])
    facts = explain(cases, device=CPU)
    assert facts["assumed"] and facts["device"]["name"] == H200.name and facts["dtype"] == "bfloat16"
    for row in facts["rows"]:
        paths = {name: row[name] for name in ("decode", "prefill") if row[name]}
        assert row["choice"] == min(paths, key=lambda name: paths[name]["predicted_us"])
        assert row["decode"] is None or (row["tokens"] <= 64 and lanes == 1)
        assert row["decode"] is not None or row["tokens"] > 1 or lanes > 1
        for path in (*paths.values(), row["dense"]):
            assert path["predicted_us"] > path["floor_us"] > 0 and path["rounds"] > 0 and path["launches"] > 0
        if decode := row["decode"]:
            assert decode["launches"] == 2 and decode["ctas"] <= H200.sms


def command(*arguments: object) -> str:
    """What `dlr-lock bench` prints, in this process."""
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_explains() -> None:
    facts = json.loads(command("--explain", "--tokens", "1,512", "--json"))
    assert [row["tokens"] for row in facts["rows"]] == [1, 512]
    words = command("--explain", "--tokens", "1,512")
    assert "no GPU here: the constants are those of an NVIDIA H200" in words
    assert "prefill" in words and "barrier" in words


def test_the_command_measures() -> None:
    words = command("--hidden", 64, "--intermediate", 96, "--tokens", 2)
    assert all(provider in words for provider in CPU_PROVIDERS)


def test_the_command_refuses_in_one_line() -> None:
    line = [sys.executable, "-m", "dlr_lock", "bench", "--tokens", "2,x"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert result.stderr.strip() == "dlr-lock: '2,x' is no list of whole numbers such as 1,16,512"


def test_the_whole_table_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    main = importlib.import_module("benchmarks.kernels").main
    assert main(["--smoke", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (results,) = tmp_path.glob("kernels-*.json")
    rows = json.loads(results.read_text())["rows"]
    assert len(rows) == 2 * 2 * len(CPU_PROVIDERS)
    with results.with_suffix(".csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [r["provider"] for r in table] == [r["provider"] for r in rows] and set(table[0]) == set(rows[0])
    assert not list(tmp_path.glob(".*"))
    capsys.readouterr()
    for wrong, why in {"--shapes=64": "'64' is no shape", "--chains=1x0": "'1x0' is no chain"}.items():
        assert main([wrong]) == 2
        assert why in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_every_provider_on_a_gpu() -> None:
    rows = by_name(tiny((4,), torch.device("cuda")))
    assert set(rows) == set(PROVIDERS)
    for row in rows.values():
        assert_measured(row)
        assert row["launches"] > 0 and row["floor_us"] > 0
        assert row["predicted_us"] or row["provider"].startswith(("naive", "lookahead"))
    assert rows["decode-graph"]["launches"] == 1
