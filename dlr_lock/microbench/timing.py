"""Seconds, launches and rates of a device, taken the same way for every provider of a benchmark.

A runner's calls rotate over copies of the weights, so that each finds its own cold in the L2 cache, as a layer of a
model does. What is reported is time a call.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Call = Callable[[int], Tensor]  # the output for copy i of the weights

WARM_UPS = 5
SAMPLE = 5e-3  # seconds of a sample at least: what starting and stopping the clock costs is then under 0.2%
_MOST_REPEATS = 1000


class Runner:
    """One provider, ready to be timed: a run is a call on the next copy or, as a CUDA graph, on all copies.

    `call` has run when this returns, so that all is compiled. Raises whatever `call` raises.
    """

    def __init__(self, call: Call, copies: int, device: torch.device, *, graph: bool = False) -> None:
        self._call, self._copies, self._device = call, copies, device
        self._turn = 0
        self._repeats = 1
        self._graph: torch.cuda.CUDAGraph | None = None
        if graph:
            self._capture()
        for _ in range(WARM_UPS):
            seconds = self._clock()
        self._repeats = min(_MOST_REPEATS, max(1, math.ceil(SAMPLE / max(seconds, 1e-7))))

    @property
    def calls(self) -> int:
        """Calls a run."""
        return 1 if self._graph is None else self._copies

    def sample(self) -> float:
        """Seconds a call: the mean over as many runs as fill SAMPLE."""
        return self._clock() / (self._repeats * self.calls)

    def run(self) -> None:
        """One run, and what it started is over on return."""
        self._run()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def output(self) -> Tensor:
        """The output for the first copy: of a graph, what its last replay wrote; else of a call of its own."""
        if self._graph is None:
            return self._call(0)
        torch.cuda.synchronize(self._device)
        return self._first

    def launches(self) -> int | None:
        """Kernels, copies and fills that one call starts, as torch.profiler sees them; None without a GPU."""
        if self._device.type != "cuda":
            return None
        torch.cuda.synchronize(self._device)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            self._call(0)
            torch.cuda.synchronize(self._device)
        started = [e for e in seen.events() or () if e.device_type == DeviceType.CUDA]
        return sum(not e.is_user_annotation for e in started) or None

    def _capture(self) -> None:
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self._call(0)
        torch.cuda.current_stream(self._device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._first = self._call(0)  # held, so that the graph's later outputs lie elsewhere
            for copy in range(1, self._copies):
                self._call(copy)

    def _run(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._call(self._turn)
            self._turn = (self._turn + 1) % self._copies

    def _clock(self) -> float:
        if self._device.type != "cuda":
            began = time.perf_counter()
            for _ in range(self._repeats):
                self._run()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        start.record()
        for _ in range(self._repeats):
            self._run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class TimedRow(Protocol):
    """What every benchmark's row says of one runner: its time a call in microseconds, or why there is none."""

    p20_us: float | None
    median_us: float | None
    p80_us: float | None
    accurate: bool
    error_message: str | None


R = TypeVar("R", bound=TimedRow)


def take_turns(
    rows: Sequence[R],
    runners: Sequence[Runner | None],
    rounds: int,
    capture: Callable[[R], AbstractContextManager[None]],
) -> list[list[float]]:
    """Samples of every runner whose row has no error, one a round, first to last and then back.

    In turns, so that what drifts (clocks, temperature) falls on all alike.

    Args:
        rows: One for each runner.
        runners: None where a provider has none.
        rounds: How many samples are taken of each.
        capture: Gives the context that a row's sample is taken in.

    Returns:
        Seconds a call, by row and round.
    """
    times: list[list[float]] = [[] for _ in rows]
    for turn in range(rounds):
        order = range(len(rows))
        for n in order if turn % 2 == 0 else reversed(order):
            runner = runners[n]
            if runner is not None and rows[n].error_message is None:
                with capture(rows[n]):
                    times[n].append(runner.sample())
    return times


def set_times(row: TimedRow, seconds: Sequence[float]) -> float:
    """Writes the quantiles of the samples into the row; returns their median in seconds."""
    p20, middle, p80 = np.quantile(seconds, (0.2, 0.5, 0.8)).tolist()
    row.p20_us, row.median_us, row.p80_us = 1e6 * p20, 1e6 * middle, 1e6 * p80
    return middle


@dataclass(frozen=True, slots=True)
class Rates:
    """What the device reaches in this run: bytes a second of a long copy, read and written; FLOPs a second of a
    large product in the benchmark's dtype."""

    copy: float
    matmul: float

    def to_dict(self) -> dict[str, float]:
        """For a result file, in GB/s and TFLOP/s."""
        return {"copy_gb_per_s": self.copy / 1e9, "matmul_tflop_per_s": self.matmul / 1e12}


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """A copy of 1 GiB and a product of 8192^3 on a GPU; 256 MiB and 512^3 on a CPU. Medians of 5.

    On a GPU after half a second of products, for an idle one's clocks are low.
    """
    gpu = device.type == "cuda"
    n, size = (2**30, 8192) if gpu else (2**28, 512)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    multiplying = Runner(lambda _: torch.mm(a, b, out=out), 1, device)
    began = time.monotonic()
    while gpu and time.monotonic() - began < 0.5:
        multiplying.run()
    # Random bytes: a CPU's fresh zeros are one page, and some devices compress them.
    source = torch.empty(n // 8, dtype=torch.int64, device=device).random_()
    target = torch.empty_like(source)
    copying = Runner(lambda _: target.copy_(source), 1, device)
    copy = 2 * n / median(copying.sample() for _ in range(5))
    return Rates(copy, 2 * size**3 / median(multiplying.sample() for _ in range(5)))
