"""Seconds of work on a device, which goes on behind the host's back."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def now(device: torch.device) -> float:
    """Seconds on a clock that only goes forward, once the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def median_seconds(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Seconds of `work()` without autograd, the median of `repeats` after a warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = now(device)
        work()
        times.append(now(device) - start)
    return statistics.median(times[1:])
