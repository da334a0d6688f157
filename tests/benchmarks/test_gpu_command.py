"""`make gpu` in its smoke form, from a bare source tree: no installation, no GPU; and what ends it early."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from venv import EnvBuilder

import pytest
import torch
from tiny import save_tiny, tiny_model

from dlr_lock.convert.data import english_topics
from dlr_lock.microbench.slot import CPU_PROVIDERS
from dlr_lock.triton_kernels import op

ROOT = Path(__file__).parents[2]
command = importlib.import_module("benchmarks.gpu.__main__")
plan = importlib.import_module("benchmarks.gpu.plan")
stage = importlib.import_module("benchmarks.gpu.stage")
schema = importlib.import_module("benchmarks.schema")


def bare_machine(folder: Path) -> tuple[Path, Path]:
    """(Python, tree): one with all that is installed here but this package, and this package's sources alone."""
    tree, venv = folder / "tree", folder / "venv"
    tree.mkdir()
    for part in ("dlr_lock", "runtime", "triton_kernels", "convert", "audit", "benchmarks", "tests"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "dlr_lock_autoload.py"):
        shutil.copy(ROOT / name, tree)
    EnvBuilder(symlinks=True).create(venv)
    (site,) = venv.glob("lib/*/site-packages")
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not path.name.startswith(("dlr_lock", "__editable__")):
            (site / path.name).symlink_to(path)
    return venv / "bin" / "python", tree


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(output, folder of the files) of all stages."""
    folder = tmp_path_factory.mktemp("gpu")
    python, tree = bare_machine(folder)
    out = folder / "out"
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    alone |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    missing = subprocess.run(
        [python, "-c", "import dlr_lock"], cwd="/", env=alone, capture_output=True, text=True
    )
    assert "No module named 'dlr_lock'" in missing.stderr
    run = subprocess.run(
        [python, "-m", "benchmarks.gpu", "--smoke", "--minutes", "9", "--out", str(out)],
        cwd=tree, env=alone, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout, out


@pytest.fixture
def same_program(smoke: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may have edited the sources since they were copied."""
    made_with = documents(smoke[1])["machine"]["source"]
    monkeypatch.setattr(stage, "source", lambda: made_with)


def documents(out: Path) -> dict[str, dict[str, Any]]:
    return {schema.kind_of(path): schema.load(path) for path in out.glob("*.json")}


def test_every_stage_writes_a_valid_file(smoke: tuple[str, Path]) -> None:
    _, out = smoke
    assert len(list(out.iterdir())) == len(plan.STAGES)
    found = documents(out)
    assert list(plan.STAGES) == sorted(found, key=list(plan.STAGES).index)
    for path in out.iterdir():
        assert str(out.parent) not in path.read_text() and str(ROOT) not in path.read_text()
    for document in found.values():
        assert document["finished"] and document["stopped"] is None and document["smoke"] and document["rows"]
        assert document["program"].startswith("dlr-lock 0.")  # though nothing is installed
        assert document["versions"]["torch"] == torch.__version__


def test_the_rows_say_what_was_measured(smoke: tuple[str, Path]) -> None:
    rows = {name: document["rows"] for name, document in documents(smoke[1]).items()}
    (on_gpu,), (command_line,) = rows["tests"], rows["moretests"]
    assert on_gpu["skipped"] > 40 and on_gpu["failed"] == 0  # without a GPU they skip
    assert command_line["passed"] == 1  # in a process that a test has started
    assert {row["provider"] for row in rows["kernels"]} == set(CPU_PROVIDERS)
    assert all(row["accurate"] and row["median_us"] > 0 for row in rows["kernels"])
    for row in rows["models"]:
        assert row["accurate"] and row["median_us"] > 0 and row["ratio_to_original"] > 0
        assert (row["error"] is None) == (row["side"] == "original")
    assert {row["phase"] for row in rows["models"]} == {"decode", "prefill"}
    assert [(row["batch"], row["side"]) for row in rows["speed"]] == [
        (batch, side) for batch in (1, 2) for side in ("locked", "original")
    ]
    for row in rows["speed"]:
        assert row["decode_tokens_per_s"][1] > 0 and row["decode_ratio"] > 0 and row["error_message"] is None
    strategies = {(row["side"], row["strategy"]): row for row in rows["training"]}
    for side in ("original", "locked"):
        plain, inference = strategies[side, "plain"], strategies[side, "inference"]
        assert plain["step_s"] > plain["backward_s"] > 0 and inference["step_s"] > 0
        assert plain["gradient_error"] == 0 and (inference["error"] is None) == (side == "original")
    short, long, together = rows["conversion"]
    assert short["random"] and short["model"].startswith("random weights")
    assert all(row["layers"] == 2 and row["text"] == "Python's help topics" for row in rows["conversion"])
    assert (short["train_tokens"], long["train_tokens"], together["train_tokens"]) == (1024, 4096, 4096)
    assert (short["end_to_end"], long["end_to_end"], together["end_to_end"]) == (0, 0, 1024)
    assert short["kl"] > long["kl"] > together["kl"] > 0 and together["smallest_gap"] > 0
    assert together["seconds"] > long["seconds"] and together["flops"] > long["flops"] > short["flops"]
    assert all(row["tflop_per_s"] > 0 and 0 < row["matmul_percent"] < 100 for row in rows["conversion"])
    profiled = {row["of"] for row in rows["profiles"]}
    assert len(profiled) == 2 and all(row["us"] >= 0 for row in rows["profiles"])


@pytest.mark.usefixtures("same_program")
def test_a_finished_stage_is_left_alone(
    smoke: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(smoke[1], out)
    arguments = ["--stage", "machine", "--smoke", "--minutes", "1", "--out", str(out)]
    assert stage.main(arguments) == 0
    assert "measured already" in capsys.readouterr().out
    assert len(list(out.glob("machine-*.json"))) == 1
    assert stage.main([*arguments, "--again"]) == 0
    assert len(list(out.glob("machine-*.json"))) == 2


@pytest.mark.usefixtures("same_program")
def test_a_stage_that_was_cut_off_goes_on(
    smoke: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = smoke[1].glob("kernels-*.json")
    document = json.loads(path.read_text())
    rows = document["rows"]
    document |= {"finished": False, "stopped": "cut off", "rows": rows[:4]}
    (tmp_path / path.name).write_text(json.dumps(document))
    assert stage.main(["--stage", "kernels", "--smoke", "--minutes", "2", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("\nkernels: ") == 4  # three cases, and the end
    (path,) = tmp_path.glob("kernels-*.json")
    again = schema.load(path)
    assert again["finished"] and again["rows"][:4] == rows[:4]
    assert {schema.key(row, "kernels") for row in again["rows"]} == {
        schema.key(row, "kernels") for row in rows
    }
    # Of another program it is left as it is, and a new file is begun.
    path.write_text(json.dumps(again | {"source": "0" * 12}))
    assert stage.main(["--stage", "kernels", "--smoke", "--minutes", "2", "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("kernels-*.json"))) == 2


def test_time_that_is_up_is_no_failure(tmp_path: Path) -> None:
    assert stage.main(["--stage", "models", "--smoke", "--minutes", "0", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("models-*.json")
    document = schema.load(path)
    assert not document["finished"] and document["stopped"] == "after 0 of 2: the limit of time"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--stage", "kernels,haste"], "'haste'"),
        (["--minutes", "0"], "--minutes"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--model", str(ROOT)], "config.json"),
        (["--data", "/no/such/text"], "/no/such/text"),
        (["--out", str(ROOT / "README.md")], "cannot write to"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.gpu: ") and error.count("\n") == 1 and says in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_no_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert stage.main(["--stage", "machine", "--minutes", "1"]) == 2
    assert capsys.readouterr().err == "benchmarks.gpu: no GPU here; --smoke runs the same stages on a CPU\n"


def test_a_stage_that_hangs_is_killed_with_all_it_started(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    code = (
        "import subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, '-c', \"import time; time.sleep(3); open({str(touched)!r}, 'w')\"]); "
        "time.sleep(60)"
    )
    began = time.monotonic()
    assert command.run([sys.executable, "-c", code], 1.5) == 1
    assert time.monotonic() - began < 20
    time.sleep(3)
    assert not touched.exists()
    assert command.run([sys.executable, "-c", "raise SystemExit(1)"], 30) == 1


def test_stages_run_one_by_one_until_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def run(given: list[str], seconds: float, sign: object) -> int | None:
        called.append((given[given.index("--stage") + 1], seconds))
        return None if called[-1][0] == "tests" else 0

    monkeypatch.setattr(command, "run", run)
    out = ["--out", str(tmp_path)]
    assert command.main(["--stage", "kernels,machine,tests", "--minutes", "5", *out]) == 1  # one hung
    assert [name for name, _ in called] == ["machine", "tests", "tests", "kernels"]  # and got no further
    assert called[0][1] == pytest.approx(120, abs=1) and all(seconds <= 300 for _, seconds in called)
    called.clear()
    assert command.main(["--stage", "kernels", "--minutes", "0.5", *out]) == 0  # too little to begin
    assert called == []


def test_a_case_that_takes_its_process_with_it_is_a_row_and_the_rest_is_measured(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    crashing = (
        "import os, sys, benchmarks.gpu.kernels as k\n"
        "import benchmarks.gpu.stage as s\n"
        "slot = k.Slot\n"
        "bad = lambda case: case.tokens == 3 and case.spec.lanes == 2\n"
        "k.Slot = lambda case, *rest: os.abort() if bad(case) else slot(case, *rest)\n"
        "sys.exit(s.main(sys.argv[1:]))"
    )
    arguments = ["--stage", "kernels", "--smoke", "--minutes", "2", "--out", str(tmp_path)]
    statuses = [
        subprocess.run([sys.executable, "-c", crashing, *arguments], cwd=ROOT).returncode for _ in range(2)
    ]
    assert statuses == [-6, 1]
    (path,) = tmp_path.glob("kernels-*.json")
    document = schema.load(path)
    assert document["finished"] and len(document["rows"]) == 1 + 3 * 4  # one of the four cases crashed
    (red,) = [row for row in document["rows"] if not row["accurate"]]
    assert (red["tokens"], red["error_message"], red["median_us"]) == (3, "hung or crashed", None)
    assert "RED" in capfd.readouterr().out


def test_a_device_that_is_lost_costs_one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = importlib.import_module("benchmarks.gpu.models")

    class AcceleratorError(RuntimeError):
        pass

    def lose(*_: Any) -> Any:
        raise AcceleratorError("CUDA error: an illegal memory access\nmore")

    monkeypatch.setattr(torch, "AcceleratorError", AcceleratorError, raising=False)
    arguments = ["--stage", "models", "--smoke", "--minutes", "2", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(models, "step_of", lose)
        assert stage.main(arguments) == plan.AGAIN
    assert stage.main(arguments) == 1
    (path,) = tmp_path.glob("*.json")
    document = schema.load(path)
    red, *others = document["rows"]
    assert red["error_message"] == "hung or crashed: CUDA error: an illegal memory access"
    assert document["finished"] and [row["accurate"] for row in others] == [True, True]


def test_a_plain_step_that_does_not_fit_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = importlib.import_module("benchmarks.gpu.training")
    train = training._train

    def small(row: Any, *rest: Any, **named: Any) -> Any:
        if row.strategy == "plain":
            raise torch.OutOfMemoryError("out of memory")
        return train(row, *rest, **named)

    monkeypatch.setattr(training, "_train", small)
    assert stage.main(["--stage", "training", "--smoke", "--minutes", "2", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    rows = schema.load(path)["rows"]
    assert {row["strategy"] for row in rows if not row["accurate"]} == {"plain"}
    assert len([row for row in rows if row["step_s"]]) == len(rows) - 2


def test_a_stage_that_falls_silent_is_started_anew_while_it_gets_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SILENCE", 0.5)
    options = plan.parser("test").parse_args(["--out", str(tmp_path), "--again"])
    file = tmp_path / "models-20270102T030405.json"
    code = (
        "import json, pathlib, sys, time\n"
        f"p = pathlib.Path({str(file)!r})\n"
        "rows = json.loads(p.read_text())['rows'] if p.exists() else []\n"
        "rows += [0] * (len(rows) < 3)\n"
        "p.write_text(json.dumps({'rows': rows}))\n"
        "time.sleep(60)"
    )
    given = []

    def stage_command(names: list[str], ends: float, options: Any) -> list[str]:
        given.append(options.again)
        return [sys.executable, "-c", code]

    monkeypatch.setattr(command, "stage_command", stage_command)
    assert command._stage(["models"], time.monotonic() + 300, options) == 1
    assert given == [True, False, False, False]  # three rows, and once without another


def test_a_command_that_is_terminated_ends_its_stage(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--stage", "conversion", "--out", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert run.stdout is not None
        assert any(line.startswith("conversion: fits 1024") for line in run.stdout)
        run.terminate()
        run.stdout.read()  # ends with the last process that has it
        assert run.wait(20) == 143
    finally:
        run.kill()
    (path,) = tmp_path.glob("*.json")
    assert schema.load(path)["begun"] is None  # it did not hang


def test_numbers_that_are_not_finite_are_red() -> None:
    rows = importlib.import_module("benchmarks.gpu.rows")
    nan = float("nan")
    row = stage.finite(
        stage.asdict(rows.TrainingRow("1B", 1, 2, 16, 8, "float32", "locked", "plain", True, nan, step_s=1.0))
    )
    assert (row["accurate"], row["loss"], row["step_s"]) == (False, None, None) and "loss" in row[
        "error_message"
    ]
    assert stage.finite({"fact": "copy", "value": nan}) == {"fact": "copy", "value": None}


def test_a_strategy_whose_gradient_is_wrong_has_no_time() -> None:
    training = importlib.import_module("benchmarks.gpu.training")
    jobs = [job for job in training.jobs(smoke=True) if job.side == "locked" and job.strategy is not None]
    original = training.build.original(jobs[0].shape, torch.float32, torch.device("cpu"))
    model = training.build.locked(original, jobs[0].shape, jobs[0].spec)
    ids = torch.arange(16)[None]

    def row() -> Any:
        return training.TrainingRow(**jobs[0].key(), tokens=16, dtype="float32")

    first = row()
    gate = training._train(first, jobs[0], model, ids, repeats=1)
    training.judge(first, gate, None, gate)
    assert first.accurate and first.gradient_error == 0 and len(gate) == 2
    again = row()
    training.judge(again, training._train(again, jobs[1], model, ids, repeats=1), stage.asdict(first), gate)
    assert again.accurate and again.gradient_error < 1e-4
    for wrong in ([gate[0], 1.1 * gate[1]], [gate[0], 0 * gate[1]], [gate[0], float("nan") * gate[1]]):
        training.judge(again, wrong, stage.asdict(first), gate)
        kept = stage.finite(stage.asdict(again))
        assert not kept["accurate"] and kept["step_s"] is None and "gradients" in kept["error_message"]


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes wrong what inference runs on a CPU, and the definition does not."""
    for name in ("run_native", "run_plain"):
        right = getattr(op, name)
        monkeypatch.setattr(op, name, lambda x, chain, right=right: 1.01 * right(x, chain))


def test_an_inference_pass_that_is_wrong_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    training = importlib.import_module("benchmarks.gpu.training")
    job = next(job for job in training.jobs(smoke=True) if job.side == "locked")
    model = training.build.locked(
        training.build.original(job.shape, torch.float32, torch.device("cpu")), job.shape, job.spec
    )
    spoil(monkeypatch)
    row = training.TrainingRow(**job.key(), tokens=16, dtype="float32")
    training._infer(row, model, torch.arange(16)[None], repeats=1)
    assert not row.accurate and row.error > row.error_limit and row.step_s is None


def test_pytest_that_does_not_run_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = importlib.import_module("benchmarks.gpu.tests")
    monkeypatch.setattr(tests, "ON_GPU", ())
    monkeypatch.setitem(tests.SMOKE, "tests", ("tests/none.py",))
    assert stage.main(["--stage", "tests", "--smoke", "--minutes", "1", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    document = schema.load(path)
    assert not document["finished"] and document["rows"] == [] and "pytest ended" in document["stopped"]


def test_a_tree_measures_itself_whatever_is_installed(tmp_path: Path) -> None:
    (tmp_path / "dlr_lock").mkdir()
    (tmp_path / "dlr_lock" / "__init__.py").write_text("raise SystemExit('another')")
    code = "import importlib.util; import benchmarks; print(importlib.util.find_spec('dlr_lock').origin)"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True
    )
    assert Path(run.stdout.strip()) == ROOT / "dlr_lock" / "__init__.py", run.stderr


def test_counts_of_pytest() -> None:
    counted = importlib.import_module("benchmarks.gpu.tests").counted
    lines = [
        "tests/a.py::test_x[1x36x64 silu] PASSED   [ 10%]",
        "tests/a.py::test_y SKIPPED (needs it)     [ 20%]",
        "tests/b.py::test_z FAILED                 [ 30%]",
        "tests/b.py::test_w ERROR                  [ 40%]",
        "FAILED tests/b.py::test_z - AssertionError: error 0.4",
        "ERROR tests/b.py::test_w - RuntimeError: CUDA error",
        "ERROR tests/c.py",
        "tests/a.py::test_hangs",
    ]
    rows = {row.file: (row.passed, row.failed, row.skipped) for row in counted(lines)}
    assert rows == {"tests/a.py": (1, 0, 1), "tests/b.py": (0, 2, 0), "tests/c.py": (0, 1, 0)}


def test_a_conversion_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a given model; the modules of the longest fits are there for the end-to-end phase of the next visit."""
    conversion = importlib.import_module("benchmarks.gpu.conversion")
    monkeypatch.setattr(conversion, "ROOT", tmp_path)
    text = tmp_path / "topics.txt"
    text.write_text(english_topics()[:40_000], encoding="utf-8")
    given = ["--model", str(save_tiny("llama", tmp_path / "source")), "--data", str(text)]
    options = plan.parser("test").parse_args([*given, "--out", str(tmp_path / "out")])

    def left(record: Any) -> float:  # a clock that does not depend on what else the machine does
        begun = record.document["begun"] or {}
        return 0.0 if begun.get("key") == {"name": "end to end 1000000000"} else 1000.0

    monkeypatch.setattr(stage.Record, "left", left)

    def visit(end_to_end: int) -> dict[str, Any]:
        curve = [conversion.Point(1024, 0), conversion.Point(2048, 0), conversion.Point(None, end_to_end)]
        monkeypatch.setattr(conversion, "points", lambda device, smoke: curve)
        assert stage.run("conversion", options, torch.device("cpu"), 0.0) == 0
        (path,) = (tmp_path / "out").glob("*.json")
        return schema.load(path)

    cut = visit(10**9)
    assert cut["stopped"] == "after 2 of 3: the limit of time" and not cut["finished"]
    assert [(row["train_tokens"], row["random"], row["model"], row["text"]) for row in cut["rows"]] == [
        (1024, False, "source", "topics.txt"), (2048, False, "source", "topics.txt")
    ]  # fmt: skip
    (kept,) = (tmp_path / "build" / "gpu").iterdir()  # those of the longest fits alone
    modules = [path for path in kept.glob("*.json") if len(path.stem) == 16]
    assert kept.name.endswith("-2048.partial") and len(modules) == 2
    figures = json.loads(modules[0].read_text())
    figures["rel_error"] = 9.5
    modules[0].write_text(json.dumps(figures))
    whole = visit(512)
    assert whole["finished"] and whole["rows"][:2] == cut["rows"]
    last = whole["rows"][2]
    assert (last["train_tokens"], last["end_to_end"], last["largest_rel_error"]) == (2048, 512, 9.5)
    # What was reached: by the fits; by the end-to-end phase alone, against the product that was measured beside it.
    fits = whole["rows"][1]
    assert fits["tflop_per_s"] == pytest.approx(fits["flops"] / fits["seconds"] / 1e12)
    flops, seconds = (last[name] - fits[name] for name in ("flops", "seconds"))
    assert last["tflop_per_s"] == pytest.approx(flops / seconds / 1e12)
    assert whole["settings"]["dtype"] == "float32"  # of so few features
    product = whole["measured_rates"]["matmul_tflop_per_s"]
    assert last["matmul_percent"] == pytest.approx(100 * last["tflop_per_s"] / product)
    assert all(0 < row["matmul_percent"] < 100 for row in whole["rows"])
    assert not list((tmp_path / "build" / "gpu").iterdir())


def test_points_of_a_conversion_that_do_not_fit_are_left_out() -> None:
    conversion = importlib.import_module("benchmarks.gpu.conversion")
    curve = conversion.points(torch.device("cuda"), smoke=False)
    fits = [point.train_tokens for point in curve if not point.end_to_end]
    assert fits == [102_400, 409_600, 1_638_400, 8_192_000]  # 20 times standard's on a CPU
    assert [point.end_to_end for point in curve[4:]] == [65_536, 262_144, 1_048_576, 4_194_304, 16_777_216]

    def left(job: Any, seconds: float, *rows: dict[str, Any]) -> bool:
        record = SimpleNamespace(rows=list(rows), left=lambda: seconds)
        return conversion._fits_in(job, record, 300.0)

    first = {"train_tokens": 102_400, "end_to_end": 0, "seconds": 30.0}
    assert left(curve[0], 10.0) and not left(curve[4], 10.0)  # nothing to train together
    assert left(curve[1], 221.0, first) and not left(curve[1], 219.0, first)  # 120 s, and 100 for the phase
    together = {"train_tokens": 102_400, "end_to_end": 65_536, "seconds": 40.0}
    assert left(curve[4], 1.0, first)
    assert left(curve[5], 45.0, first, together) and not left(curve[5], 44.0, first, together)


def test_a_decoded_token_is_that_of_the_whole_text() -> None:
    step = importlib.import_module("benchmarks.gpu.step")
    model = tiny_model("llama")
    with torch.no_grad():
        decode = step.decode_step(model, 2, 8)
        first, again = decode(), decode()
        whole = model(input_ids=step._ids(model, 2, 9)).logits[:, -1]
    assert torch.equal(first, again)  # at the same position every time
    assert torch.allclose(first, whole, atol=1e-5)


def test_a_step_waits_for_nothing() -> None:
    build = importlib.import_module("benchmarks.gpu.build")
    step = importlib.import_module("benchmarks.gpu.step")
    shape = build.TINY[0]
    original = build.original(shape, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for model in (build.locked(original, shape, shape.specs()[0]), original):
            model.to("meta")  # where reading a value is an error, as it is while a CUDA graph is captured
            assert step.decode_step(model, 2, 8)().shape == (2, shape.vocabulary)
            assert step.prefill_step(model, 80)().shape == (1, shape.vocabulary)


def test_a_locked_model_that_is_wrong_has_an_error_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    build = importlib.import_module("benchmarks.gpu.build")
    models = importlib.import_module("benchmarks.gpu.models")
    job = models.jobs(smoke=True)[1]
    theirs = build.original(job.shape, torch.float32, torch.device("cpu"))
    ours = build.locked(theirs, job.shape, job.spec)
    assert all(row.accurate and row.median_us for row in models.compared(job, ours, theirs, rounds=1))
    spoil(monkeypatch)
    (original, locked) = models.compared(job, ours, theirs, rounds=1)
    assert original.accurate and original.median_us
    assert not locked.accurate and locked.error > locked.error_limit > locked.naive_error
    assert locked.median_us is None and locked.ratio_to_original is None and locked.tokens_per_s is None
