"""What launching costs the host, counted in function calls: time would tell of the machine."""

import subprocess
import sys
from pathlib import Path

from benchmarks.schema import load

ROOT = Path(__file__).parents[2]


def test_launches_stay_within_their_budget(tmp_path: Path) -> None:
    """In a process of its own, whose driver launches nothing."""
    command = [sys.executable, "-m", "benchmarks.host", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    (path,) = tmp_path.glob("host-*.json")
    found = {row["what"]: row for row in load(path)["rows"]}
    calls = {what: row["calls"] for what, row in found.items()}
    assert found["prefill"]["launches"] == 18  # three a round of two steps
    assert calls["launch"] <= 45
    assert calls["launch"] < calls["launch by Triton"] < 100  # one that was not compiled: thousands
    assert calls["prefill"] <= 50 * 18
    assert calls["decode"] <= 120
