"""Result files: what is accepted, how two compare, and that the page of measurements says what they say."""

import copy
import importlib
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from dlr_lock import DLRError

compare = importlib.import_module("benchmarks.compare")
render = importlib.import_module("benchmarks.render")
schema = importlib.import_module("benchmarks.schema")
tables = importlib.import_module("benchmarks.tables")
RESULTS = render.RESULTS
MODEL = {
    "model": "1B", "hidden": 2048, "intermediate": 8192, "layers": 16, "lanes": 8, "depth": 48, "rank": 32,
    "phase": "decode", "batch": 1, "tokens": 1, "context": 256, "dtype": "bfloat16",
}  # fmt: skip
TIMED = {"accurate": True, "median_us": 800.0, "p20_us": 790.0, "p80_us": 810.0, "tokens_per_s": 1250.0}
HEAD = {
    "schema": 1,
    "device": "NVIDIA H200",
    "driver": "580.1",
    "cpu_threads": 16,
    "program": "dlr-lock 0.1.0",
    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
    "date": "2027-01-02T03:04:05+00:00",
    "stopped": None,
}


def kernel_row(provider: str, us: float | None, error: float = 2e-3, **other: Any) -> dict[str, Any]:
    return {
        "provider": provider, "hidden": 576, "intermediate": 1536, "lanes": 1, "depth": 72, "rank": 32,
        "tokens": 1, "dtype": "bfloat16", "params_ratio": 1.0, "accurate": us is not None, "error": error,
        "error_limit": 3e-3, "error_message": None, "median_us": us, "p20_us": us and 0.95 * us,
        "p80_us": us and 1.05 * us, "predicted_us": 35.0,
    } | other  # fmt: skip


def kernels(*rows: dict[str, Any], **head: Any) -> dict[str, Any]:
    return HEAD | {"settings": {"dtype": "bfloat16"}} | head | {"rows": list(rows)}


def written(folder: Path, document: dict[str, Any], name: str = "kernels-20270102T030405.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(document))
    return folder / name


def copied(folder: Path) -> tuple[Path, list[str]]:
    """A copy of the page and the results, and the arguments that render it."""
    shutil.copytree(RESULTS, folder / "benchmarks/results")
    (folder / "docs").mkdir()
    page = Path(shutil.copy(render.PAGE, folder / "docs"))
    return page, ["--page", str(page), "--results", str(folder / "benchmarks/results")]


def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.style", "matplotlib.figure", "matplotlib.ticker"):
        monkeypatch.setitem(sys.modules, name, None)


def texts(svg: Path) -> str:
    return " ".join(e.text or "" for e in ET.parse(svg).iter("{http://www.w3.org/2000/svg}text"))


def test_what_is_committed_is_valid() -> None:
    found = [path for path in RESULTS.glob("*/*.json") if schema.kind_of(path)]
    assert found
    for path in found:
        schema.load(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 2}, "schema 2 is not 1"),
        ({"device": None}, "device is None"),
        ({"date": "yesterday"}, "date is 'yesterday'"),
        ({"rows": [{}]}, "row 0: provider is missing"),
        ({"rows": [kernel_row("dense-graph", 4.0) | {"median_us": "4"}]}, "row 0: median_us is '4'"),
        ({"rows": [kernel_row("dense-graph", 4.0) | {"median_us": float("nan")}]}, "row 0: median_us is nan"),
        ({"rows": [kernel_row("dense-graph", 4.0) | {"tokens": True}]}, "row 0: tokens is True"),
        ({"rows": [kernel_row("dense-graph", 4.0) | {"speed": 1}]}, "row 0: 'speed' is not known"),
        ({"rows": [kernel_row("ours-graph", 4.0) | {"accurate": False}]}, "though the row is not accurate"),
        ({"stage": "kernels"}, "source is missing"),
        ({"stage": "haste"}, "is no result"),
        ({"stage": [1]}, "is no result"),
        ({"stage": "models"}, "stage is 'models', though its name begins with kernels"),
        ({"cpu_threads": 10**400}, "cpu_threads is 1000"),
        ({"settings": None}, "settings is None"),
        (
            {"rows": [{k: v for k, v in kernel_row("ours-graph", 4.0).items() if k != "accurate"}]},
            "not accurate",
        ),
        (
            {"rows": [kernel_row("ours-graph", 4.0, error=0.4)]},
            "row 0: accurate, though the error 4.0e-01 is over",
        ),
        ({"rows": [kernel_row("ours-graph", -4.0)]}, "row 0: median_us is -4.0"),
        ({"rows": [kernel_row("ours-graph", 4.0, tokens=0)]}, "row 0: tokens is 0"),
        ({"rows": [kernel_row("ours-graph", 4.0, params_ratio=10**400)]}, "row 0: params_ratio is 1000"),
        ({"rows": [kernel_row("ours-graph", None) | {"gb_per_s": 1.0}]}, "gb_per_s is given, though"),
        ({"rows": 2 * [kernel_row("ours-graph", 4.0)]}, "row 1: the same as row 0"),
    ],
)
def test_what_no_run_writes_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = written(tmp_path, kernels(kernel_row("dense-graph", 4.0)))
    schema.load(path)
    path = written(tmp_path, kernels(kernel_row("dense-graph", 4.0)) | change)
    with pytest.raises(DLRError) as error:
        schema.load(path)
    assert says in str(error.value) and path.name in str(error.value)


def test_two_runs_compare_with_the_worst_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = kernels(
        *(kernel_row(name, 10.0) for name in ("ours-graph", "dense-graph", "ours-eager", "naive-graph"))
    )
    after = kernels(
        kernel_row("ours-eager", 8.0),
        kernel_row("dense-graph", 10.2),
        kernel_row("ours-graph", 13.0),
        kernel_row("naive-graph", None, error=0.4),
        kernel_row("prefill-graph", 1.0),
        kernel_row("naive-eager", 1.0),
    )
    before["rows"] += [kernel_row("naive-eager", None), kernel_row("decode-graph", 5.0)]
    changes = compare.compared(before | {"stage": "kernels"}, after | {"stage": "kernels"})
    assert [change.verdict for change in changes] == ["red", "vanished", "slower", "same", "faster", "green"]
    assert [change.row.split(",")[0] for change in changes] == [
        "naive-graph", "decode-graph", "ours-graph", "dense-graph", "ours-eager", "naive-eager"
    ]  # fmt: skip
    slower = changes[2]
    assert slower.ratio == pytest.approx(1.3)
    assert (slower.low, slower.high) == (pytest.approx(1.3 * 0.95 / 1.05), pytest.approx(1.3 * 1.05 / 0.95))
    files = [str(written(tmp_path / name, d)) for name, d in (("before", before), ("after", after))]
    assert compare.main(files) == 0
    printed = capsys.readouterr().out
    assert (
        "1.300" in printed and "5 rows compared, of 5 and 5" in printed and "error 0.4 over 0.003" in printed
    )


def test_files_that_do_not_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = written(tmp_path / "a", kernels(kernel_row("dense-graph", 4.0)))
    other = written(tmp_path / "b", kernels(kernel_row("dense-graph", 4.0, tokens=2)))
    facts = HEAD | {"rows": [{"fact": "copy", "value": 4300.0}]}
    machine = written(tmp_path / "c", facts, "machine-20270102T030405.json")
    (tmp_path / "d.json").write_text("{")
    elsewhere = written(tmp_path / "e", kernels(kernel_row("dense-graph", 4.0), device="NVIDIA H100"))
    assert compare.main([str(one), str(elsewhere), "--anyway"]) == 0
    for pair, says in (
        ((one, other), "no row in common"),
        ((one, machine), "two kinds, kernels and machine"),
        ((machine, machine), "no times"),
        ((one, elsewhere), "device differs: NVIDIA H200, then NVIDIA H100"),
        ((one, tmp_path / "d.json"), "d.json cannot be read"),
        ((tmp_path / "none.json", one), "none.json cannot be read"),
    ):
        assert compare.main([str(path) for path in pair]) == 2
        error = capsys.readouterr().err
        assert error.startswith("benchmarks.compare: ") and error.count("\n") == 1 and says in error


def test_the_page_says_what_the_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert render.main(["--check"]) == 0, capsys.readouterr().out


def test_a_page_that_says_something_else_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, where = copied(tmp_path)
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("### AMD EPYC (CPU)", "### Something faster"), encoding="utf-8")
    assert render.main(["--check", *where]) == 1
    assert "-### Something faster" in capsys.readouterr().out
    assert render.main(where) == 0
    assert page.read_text(encoding="utf-8") == text
    page.write_text("no marks\n")
    assert render.main(where) == 2
    assert "must have the lines" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["another run", "another drawing", "none"])
def test_a_plot_that_is_not_of_its_results_fails_without_matplotlib(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_matplotlib(monkeypatch)
    _, where = copied(tmp_path)
    assert render.main(["--check", *where]) == 0
    plot = next(tmp_path.glob("benchmarks/results/cpu-amd-epyc/*.svg"))
    if fault == "another run":  # whose tables are the same
        path = next(plot.parent.glob("kernels-*.json"))
        text = path.read_text()
        path.write_text(re.sub(r'"p80_us": (\d+)', r'"p80_us": 1\1', text, count=1))
        assert path.read_text() != text
    elif fault == "another drawing":
        plot.write_text(plot.read_text().replace("L ", "L 1", 1))
    else:
        plot.unlink()
    assert render.main(["--check", *where]) == 1
    printed = capsys.readouterr().out
    assert "cpu-amd-epyc/times.svg)" in printed  # the link that the page has and should not
    assert (f"{plot} is not what was drawn" in printed) == (fault != "none")


def test_without_a_gpu_predictions_are_marked() -> None:
    text = render.block({})
    assert "**not measured yet**" in text and "**Predictions**" in text and "| 4096 x 14336 |" in text


def test_the_newest_run_of_a_device_is_rendered_and_red_rows_have_no_time(tmp_path: Path) -> None:
    folder = tmp_path / "nvidia-h200"
    rows = [kernel_row("dense-graph", 4.25), kernel_row("naive-graph", 123.0), kernel_row("ours-graph", 31.0)]
    written(folder, kernels(*rows, date="2026-12-01T00:00:00+00:00"), "kernels-20261201T000000.json")
    assert "| 576 x 1536 | 1x72x32 | 1 | 4.2 | 123 | 31.0 | 7.29 | 2e-03 | 35 |" in render.block(
        render.newest(tmp_path)
    )
    red = copy.deepcopy(rows)
    red[2] = kernel_row("ours-graph", None, error=0.25)
    written(folder, kernels(*red))
    tiny = {"stage": "kernels", "source": "0", "smoke": True, "finished": True, "seconds": 1.0, "options": {}}
    later = kernels(*rows, date="2027-02-01T00:00:00+00:00") | tiny
    written(folder, later, "kernels-20270201T000000.json")  # a smoke run is no result
    text = render.block(render.newest(tmp_path))
    assert "| 4.2 | 123 | error 2.5e-01 | - |" in text and "31.0" not in text
    assert "### NVIDIA H200" in text and "2027-01-02" in text and "triton 3.6.0" in text
    assert "Predictions" not in text and "On this GPU **not measured yet**: machine, tests, models," in text
    written(folder, kernels({"provider": "ours-graph"}), "kernels-20270301T000000.json")
    with pytest.raises(DLRError, match="row 0: hidden is missing"):
        render.newest(tmp_path)


def test_predictions_stay_until_kernels_were_measured(tmp_path: Path) -> None:
    facts = [{"fact": "copy", "value": 4301.5, "unit": "GB/s"}]
    written(tmp_path / "nvidia-h200", HEAD | {"rows": facts}, "machine-20270102T030405.json")
    text = render.block(render.newest(tmp_path))
    assert "**Predictions**" in text and "On this GPU **not measured yet**: tests, kernels," in text


def test_one_engine_and_one_path_stand_for_both_sides(tmp_path: Path) -> None:
    folder = tmp_path / "nvidia-h200"
    rows = [
        kernel_row("dense-graph", 4.0),
        kernel_row("naive-graph", 90.0),
        kernel_row("ours-graph", None, error=0.3),
    ]
    rows += [
        kernel_row(name, 2.0) for name in ("ours-eager", "lookahead-eager", "decode-graph", "dense-eager")
    ]
    written(folder, kernels(*rows))
    steps = [
        MODEL
        | {"side": side, "engine": engine}
        | (TIMED if engine == "eager" else {"error_message": "no graph"})
        for side in ("original", "locked")
        for engine in ("eager", "graph")
    ]
    steps[1] |= TIMED  # of the original the graph, too
    written(folder, HEAD | {"rows": steps}, "models-20270102T030405.json")
    text = render.block(render.newest(tmp_path))
    assert "| 4.0 | 90.0 | error 3.0e-01 | - |" in text
    assert "| decode, 1 | 800 | failed | - |" in text


def test_a_run_of_few_providers_has_no_lines(tmp_path: Path) -> None:
    written(tmp_path / "nvidia-h200", kernels(kernel_row("dense-graph", 4.0)))
    text = render.block(render.newest(tmp_path))
    assert "### NVIDIA H200" in text and "| 576 x 1536 |" not in text


def speed_row(side: str, engine: str = "transformers", **other: Any) -> dict[str, Any]:
    key = {
        "model": "locked",
        "engine": engine,
        "dtype": "float32",
        "prompt": 64,
        "new_tokens": 16,
        "batch": 8,
    }
    return key | {"side": side} | other


def test_speeds_of_both_models_stand_in_a_line(tmp_path: Path) -> None:
    ours = {
        "first_token_s": [0.09, 0.1, 0.11],
        "decode_tokens_per_s": [50.0, 60.0, 62.0],
        "decode_ratio": 0.75,
    }
    theirs = {
        "first_token_s": [0.1, 0.2, 0.3],
        "decode_tokens_per_s": [79.0, 80.0, 81.0],
        "decode_ratio": 1.0,
    }
    rows = [
        speed_row("locked", **ours), speed_row("original", **theirs),
        speed_row("locked", "vllm", error_message="died"), speed_row("original", "vllm", **theirs),
    ]  # fmt: skip
    written(tmp_path / "cpu", HEAD | {"device": "CPU A", "rows": rows}, "speed-20270102T030405.json")
    text = render.block(render.newest(tmp_path))
    assert (
        "| locked | transformers | float32 | 8 | 100.0 ± 10% / 200.0 | failed | - | 60.0 ± 10% / 80.0 | 0.75 |"
        in text
    )
    assert "| locked | vllm | float32 | 8 | failed | failed | - | failed | - |" in text


def test_files_of_several_engines_become_one() -> None:
    speed = importlib.import_module("benchmarks.speed")

    def document(*rows: dict[str, Any], **other: Any) -> dict[str, Any]:
        runs = [{"engine": row["engine"], "dtype": row["dtype"]} for row in rows]
        return HEAD | {"rows": list(rows), "runs": runs} | other

    before = document(speed_row("locked"), speed_row("locked", "vllm"))
    found = speed.merged(before, document(speed_row("locked", weights_bytes=5), versions={"torch": "2.12"}))
    assert found["rows"] == [speed_row("locked", "vllm"), speed_row("locked", weights_bytes=5)]
    assert [run["engine"] for run in found["runs"]] == ["vllm", "transformers"]
    with pytest.raises(DLRError, match="cpu_threads was 16, and is 1: write to another file"):
        speed.merged(before, document(speed_row("locked"), cpu_threads=1))


def test_every_kind_of_a_gpu_run_has_its_table(tmp_path: Path) -> None:
    step = {"model": "1B", "lanes": 8, "depth": 48, "rank": 32, "tokens": 4096, "dtype": "bfloat16"}
    point = {
        "model": "SmolLM2", "random": False, "text": "wiki.txt", "layers": 30, "tokens": 10**6, "end_to_end": 0,
        "seconds": 120.5, "flops": 1.5e15, "original_loss": 3.0, "loss": 3.2, "flips": 0.18, "smallest_gap": 0.8,
        "largest_rel_error": 0.2,
    }  # fmt: skip
    documents = {
        "machine": [{"fact": "copy, read and written", "value": 4301.5, "unit": "GB/s"}],
        "tests": [{"file": "tests/a.py", "passed": 90, "failed": 1, "skipped": 2, "failures": ["FAILED"]}],
        "models": [
            MODEL | {"side": "original", "engine": "graph"} | TIMED,
            MODEL | {"side": "locked", "engine": "eager"} | TIMED | {"median_us": 3000.0},
            MODEL | {"side": "locked", "engine": "graph"} | TIMED | {"median_us": 1000.0, "error": 0.004},
        ],
        "training": [
            step | {"side": "locked", "strategy": "inference", "accurate": True, "step_s": 0.1},
            step | {"side": "locked", "strategy": "plain", "accurate": True, "step_s": 2.5, "peak_bytes": 80 * 10**9},
            step | {"side": "locked", "strategy": "inversion", "accurate": True, "step_s": 1.2, "peak_bytes": 10**9},
        ],
        "conversion": [
            point | {"name": "1", "train_tokens": 102_400, "kl": 0.8},
            point | {"name": "2", "train_tokens": 409_600, "kl": 0.4},
            point | {"name": "3", "train_tokens": 409_600, "kl": 0.3, "end_to_end": 65_536}
            | {"tflop_per_s": 248.04, "matmul_percent": 34.96},
        ],
    }  # fmt: skip
    for kind, rows in documents.items():
        written(tmp_path / "nvidia-h200", HEAD | {"rows": rows}, f"{kind}-20270102T030405.json")
    text = render.block(render.newest(tmp_path))
    assert "one large product" not in text
    rates = {"measured_rates": {"matmul_tflop_per_s": 709.5}, "settings": {"dtype": "bfloat16"}}
    measured = HEAD | rates | {"rows": documents["conversion"]}
    written(tmp_path / "nvidia-h200", measured, "conversion-20270102T030405.json")
    text = render.block(render.newest(tmp_path))
    for wanted in (
        "one large product in bfloat16 reaches 710 TFLOP/s",
        "copy, read and written 4,302 GB/s",
        "90 passed, 1 failed, 2 skipped",
        "| 1B | 8x48x32 | decode, 1 | 800 | 1,000 | 1.25 | 1,250 | 4e-03 |",
        "| 1B | locked | 100.0 | 25.0, 80.0 GB | 12.0, 1.0 GB | inversion |",
        "All 30 layers of SmolLM2 locked at ascending cost, on wiki.txt",
        "| 409,600 | 0 | 120 | 1.5 | - | - | 3.000 to 3.200 | 0.400 | 18% | 0.80 |",  # of before that was measured
        "| 409,600 | 65,536 | 120 | 1.5 | 248 | 35.0% | 3.000 to 3.200 | 0.300 | 18% | 0.80 |",
        "Fits of 8,192,000 training tokens would end at a KL of 0.089 by the last two points: not measured.",
    ):
        assert wanted in text
    assert "end-to-end phase of" not in text  # one point has no slope


def test_a_device_has_a_plot_of_what_is_accurate(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "results/nvidia-h200"
    rows = [
        kernel_row(provider, us, tokens=tokens, depth=depth)
        for provider, times in {
            "dense-graph": (4.0, 5.0),
            "naive-graph": (90, 91),
            "ours-graph": (7, None),
        }.items()
        for depth, us in zip((72, 36), times, strict=True)
        for tokens in (1, 512)
    ]
    written(folder, kernels(*rows))
    page = tmp_path / "measurements.md"
    page.write_text(f"{render.BEGIN}\n{render.END}\n")
    where = ["--page", str(page), "--results", str(tmp_path / "results")]
    assert render.main(where) == 0
    assert "](results/nvidia-h200/times.svg)\n" in page.read_text()
    shown = texts(folder / "times.svg")
    for wanted in ("NVIDIA H200, 2027-01-02", "MLP 576 x 1536, bfloat16", "512", "1x72x32"):
        assert wanted in shown
    assert "1x36x32" not in shown and "Whole models" not in shown  # the gate of the first is red
    first = (folder / "times.svg").read_bytes()
    assert render.main(where) == 0 and (folder / "times.svg").read_bytes() == first
    steps = [MODEL | {"side": side, "engine": "graph"} | TIMED for side in ("original", "locked")]
    written(folder, HEAD | {"rows": steps}, "models-20270102T030405.json")
    assert render.main(["--check", *where]) == 1  # the plot lacks the models
    assert render.main(where) == 0 and render.main(["--check", *where]) == 0
    shown = texts(folder / "times.svg")
    assert "Whole models, bfloat16" in shown and "1B 8x48x32" in shown and "1x72x32" in shown


def test_without_matplotlib_tables_are_written_and_no_plot_is_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_matplotlib(monkeypatch)
    page, where = copied(tmp_path)
    for plot in tmp_path.glob("benchmarks/results/*/*.svg"):
        plot.unlink()
    assert render.main(where) == 0
    printed = capsys.readouterr().out
    assert "needs matplotlib: pip install" in printed and printed.count("\n") == 1
    text = page.read_text(encoding="utf-8")
    assert "| 576 x 1536 |" in text and ".svg" not in text
    assert render.main(["--check", *where]) == 0


def test_what_the_cost_model_misses_by_a_third_is_marked() -> None:
    facts = [
        {"fact": "barrier", "value": 1.4, "unit": "us", "assumed": 1.0},
        {"fact": "node", "value": 1.1, "unit": "us", "assumed": 1.0},
        {"fact": "L2", "value": 24.0, "unit": "GB/s", "assumed": 48.0},
    ]
    text = tables.machine(HEAD | {"rows": facts})[0]
    assert "barrier 1.4 us (**1.40** of 1); node 1.1 us; L2 24 GB/s (**0.50** of 48)" in text
