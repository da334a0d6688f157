"""What the cost model rests on, measured by kernels that do that alone: barrier, additions, reads, a node's price."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlr_lock.microbench.timing import Runner
from dlr_lock.triton_kernels.decode import arrive, wait
from dlr_lock.triton_kernels.gpu import Device

from .rows import FactRow

BARRIERS = 200
ADDED = 16 * 768  # float32 values that a program adds at a time: P of 16 tokens and a rank of 768
READ = 8192  # that it reads at a time
ADDITIONS, READS = 100, 400  # of a program
CACHED = 16 * 2**20  # bytes that are read again and again: they stay in L2
NODES = 100


def facts(device: torch.device, assumed: Device) -> list[FactRow]:
    """A row each, with what the cost model assumes beside it."""
    programs = assumed.sms

    def seconds(call: Callable[[int], Tensor]) -> float:
        runner = Runner(call, 1, device, graph=True)
        return min(runner.sample() for _ in range(5))

    counter = torch.zeros(1, dtype=torch.int32, device=device)
    sums, values = torch.zeros(ADDED, device=device), torch.ones(CACHED // 4, device=device)
    read = torch.empty(2 * programs, READ, device=device)
    once = seconds(lambda _: barriers(counter, programs, 1))
    barrier = (seconds(lambda _: barriers(counter, programs, 1 + BARRIERS)) - once) / BARRIERS
    once = seconds(lambda _: additions(sums, programs, 1))
    added = (seconds(lambda _: additions(sums, programs, 1 + ADDITIONS)) - once) / ADDITIONS
    once = seconds(lambda _: reads(values, read, 1))
    each = (seconds(lambda _: reads(values, read, 1 + READS)) - once) / READS
    node = seconds(lambda _: nodes(counter, programs, NODES)) / NODES
    # Each program of the two on a multiprocessor reads READ values; all together add `programs` times ADDED.
    return [
        FactRow("barrier of all multiprocessors", 1e6 * barrier, "us", 1e6 * assumed.barrier),
        FactRow("additions of all in L2", 4e-9 * programs * ADDED / added, "GB/s", 1e-9 * assumed.atomics),
        FactRow("L2 to each multiprocessor", 4e-9 * 2 * READ / each, "GB/s", 1e-9 * assumed.sm_bandwidth),
        FactRow("cooperative node of a CUDA graph", 1e6 * node, "us", 1e6 * assumed.launch),
    ]


def barriers(counter: Tensor, programs: int, times: int) -> Tensor:
    """Every program waits for all others, `times` times; counter: [1] int32."""
    counter.zero_()
    barrier_kernel[(programs,)](counter, TIMES=times, launch_cooperative_grid=True)
    return counter


def additions(sums: Tensor, programs: int, times: int) -> Tensor:
    """Every program adds 1 to all of sums, float32, `times` times."""
    add_kernel[(programs,)](
        sums, TIMES=times, SIZE=len(sums), BLOCK=triton.next_power_of_2(len(sums)), num_warps=8
    )
    return sums


def reads(values: Tensor, out: Tensor, times: int) -> Tensor:
    """Program i adds up `times` pieces of values, from the i-th on, into row i of out [programs, a piece] float32."""
    pieces = values.numel() // out.shape[1]
    read_kernel[(len(out),)](values, out, TIMES=times, SIZE=out.shape[1], PIECES=pieces, num_warps=8)
    return out


def nodes(counter: Tensor, programs: int, times: int) -> Tensor:
    """Launches of a cooperative grid that does next to nothing."""
    for _ in range(times):
        barrier_kernel[(programs,)](counter, TIMES=0, launch_cooperative_grid=True)
    return counter


@triton.jit
def barrier_kernel(p_counter, TIMES: tl.constexpr):
    for n in range(TIMES):
        arrive(p_counter)
        wait(p_counter, (n + 1) * tl.num_programs(0))


@triton.jit
def add_kernel(p_sums, TIMES: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    for _ in range(TIMES):
        tl.atomic_add(p_sums + o, tl.full((BLOCK,), 1.0, tl.float32), mask=o < SIZE, sem="relaxed")


@triton.jit
def read_kernel(p_values, p_out, TIMES: tl.constexpr, SIZE: tl.constexpr, PIECES: tl.constexpr):
    i = tl.program_id(0)
    o = tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for n in range(TIMES):  # past L1, which is not what is asked for
        total += tl.load(p_values + (i + n) % PIECES * SIZE + o, cache_modifier=".cg")
    tl.store(p_out + i * SIZE + o, total)
