"""The kernels that measure what the cost model rests on: that they do what is timed, and that they compile."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def interpreted() -> None:
    """In Triton's interpreter, which runs one program after another: a barrier of one is all that ends there."""
    import torch

    from benchmarks.gpu import probes

    assert probes.barriers(torch.zeros(1, dtype=torch.int32), 1, 5).item() == 5
    assert (probes.additions(torch.zeros(48), 3, 4) == 12).all()
    values = torch.randn(5, 16)
    out = probes.reads(values.flatten(), torch.zeros(3, 16), 7)
    for i, row in enumerate(out):
        wanted = torch.stack([values[(i + n) % 5] for n in range(7)]).double().sum(0)
        torch.testing.assert_close(row.double(), wanted, rtol=1e-5, atol=1e-5)


def compiled() -> None:
    """For compute capability 9.0, launched by a driver that does nothing."""
    import torch
    import triton

    from benchmarks.gpu import probes
    from benchmarks.host import IdleDriver

    triton.runtime.driver.set_active(IdleDriver())
    counter = torch.zeros(1, dtype=torch.int32)
    probes.barriers(counter, 132, 1 + probes.BARRIERS)
    probes.nodes(counter, 132, 2)
    probes.additions(torch.zeros(probes.ADDED), 132, 1 + probes.ADDITIONS)
    probes.reads(torch.ones(probes.CACHED // 4), torch.empty(264, probes.READ), 1 + probes.READS)


PROGRAMS: dict[str, Callable[[], None]] = {"interpreted": interpreted, "compiled": compiled}


@pytest.mark.parametrize("name", PROGRAMS)
def test_probes(name: str) -> None:
    """In a process of its own: Triton decides on import whether it interprets."""
    environment = os.environ | {"TRITON_INTERPRET": str(int(name == "interpreted")), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, name]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    PROGRAMS[sys.argv[1]]()
