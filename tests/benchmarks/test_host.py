"""What launching costs the host, counted in function calls: time would tell of the machine."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_launches_stay_within_their_budget() -> None:
    """In a process of its own, whose driver launches nothing."""
    command = [sys.executable, "-m", "benchmarks.host"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout)
    assert found["launches"] == 18  # three a round of two steps
    assert found["launch"]["calls"] <= 45
    assert (
        found["launch"]["calls"] < found["launch_by_triton"]["calls"] < 100
    )  # one that was not compiled: thousands
    assert found["prefill_calls_a_launch"] <= 50
    assert found["decode"]["calls"] <= 120
