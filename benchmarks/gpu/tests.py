"""Stages `tests` and `moretests`: the tests of the kernels on the device, a process and a row a file."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable

from dlr_lock import DLRError

from ..output import ROOT
from .rows import SuiteRow
from .stage import Record, die_with_parent

_KERNELS = "tests/triton_kernels/"
# Those that run kernels on a GPU, where there is one. Nobody runs test_aot: it compiles for other devices, for minutes.
ON_GPU = tuple(f"{_KERNELS}test_{name}.py" for name in ("gpu", "activations", "decode", "prefill", "solve"))
# One that starts a process of its own, to see that it finds the package; the first file skips without a GPU.
SMOKE = {
    "tests": ON_GPU[:1],
    "moretests": ("tests/microbench/test_bench.py::test_the_command_refuses_in_one_line",),
}
_ENDED = re.compile(r"^(?P<file>\S+?)::.*? (?P<how>PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")
_REASON = re.compile(r"^(?:FAILED|ERROR) (?P<file>\S+?)(?:::| |$).*")


def measure(record: Record) -> None:
    """A row a file, each by a pytest of its own, and what pytest itself said of those that failed."""
    listed = SMOKE[record.stage] if record.smoke else files(record.stage)
    for name in record.unmeasured(
        listed, _key, lambda name, why: SuiteRow(**_key(name), failed=1, failures=[why])
    ):
        record.add(_run(record, name))


def files(stage: str) -> list[str]:
    """The files of tests of a stage, those of most worth first."""
    if stage == "tests":
        return list(ON_GPU)
    others = sorted(f"{_KERNELS}{path.name}" for path in (ROOT / _KERNELS).glob("test_*.py"))
    return [
        "tests/microbench/test_bench.py",
        *(n for n in others if n not in ON_GPU and not n.endswith("test_aot.py")),
    ]


def _key(name: str) -> dict[str, str]:
    return {"file": name.split("::")[0]}


def _run(record: Record, name: str) -> SuiteRow:
    """Raises DLRError where pytest itself does not run."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider", name]
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=die_with_parent,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
            if _ENDED.match(line):
                record.alive(f"after {line.split(' ')[0]}"[:200])
    rows = [row for row in counted(lines) if row.file == _key(name)["file"]]
    said = f"pytest ended with status {running.returncode}: {lines[-1] if lines else 'no output'}"[:300]
    if not rows and running.returncode >= 0:
        raise DLRError(said)
    row = rows[0] if rows else SuiteRow(**_key(name))
    if running.returncode not in (0, 1):  # 1: some failed, which the row says
        row.failed, row.failures = row.failed + 1, [*row.failures, said]
    return row


def counted(lines: Iterable[str]) -> list[SuiteRow]:
    """A row for each file in what `pytest -v` printed."""
    rows: dict[str, SuiteRow] = {}
    for line in lines:
        if ended := _ENDED.match(line):
            row = rows.setdefault(ended["file"], SuiteRow(ended["file"]))
            if ended["how"] in ("PASSED", "XPASS"):
                row.passed += 1
            elif ended["how"] in ("SKIPPED", "XFAIL"):
                row.skipped += 1
            else:
                row.failed += 1
        elif said := _REASON.match(line):
            row = rows.setdefault(said["file"], SuiteRow(said["file"]))
            row.failures.append(line[:300])
            row.failed = max(row.failed, len(row.failures))  # a file that could not be collected has no tests
    return list(rows.values())
