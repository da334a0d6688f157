"""Stage `tests`: the tests of the kernels on the device, in a process of their own, counted a file."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable

from ..bootstrap import ROOT
from .rows import SuiteRow
from .stage import Record

FIRST = "tests/triton_kernels/test_gpu.py"
# Without what compiles for other devices: it takes minutes and needs no GPU.
ALL = (
    FIRST,
    "tests/triton_kernels",
    "tests/runtime/test_bench.py",
    "--ignore=tests/triton_kernels/test_aot.py",
)
# One that starts a process of its own, to see that it finds the package; the first file skips without a GPU.
SMOKE = (FIRST, "tests/runtime/test_bench.py::test_the_command_refuses_in_one_line")
_ENDED = re.compile(r"^(?P<file>\S+?)::.*? (?P<how>PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")
_REASON = re.compile(r"^(?:FAILED|ERROR) (?P<file>\S+?)(?:::| |$).*")


def measure(record: Record) -> None:
    """A row a file, and what pytest itself said of those that failed."""
    # Where this package is not installed, this folder makes it importable; it does nothing where it is.
    paths = [str(ROOT / "benchmarks" / "site"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    environment["PYTHONUNBUFFERED"] = "1"  # or what was counted is lost with a process that is killed
    command = [sys.executable, "-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider"]
    command += SMOKE if record.smoke else ALL
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
            if _ENDED.match(line):
                record.document["rows"] = []  # a process that is killed has written the counts until then
                record.add(*counted(lines))
    record.document["rows"] = []
    record.add(*counted(lines))
    if running.returncode not in (0, 1):  # 1: some failed, which their rows say
        record.stop(f"pytest ended with status {running.returncode}: {lines[-1] if lines else 'no output'}")


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
