"""The decode kernels' schedules in plain torch, one CTA at a time, in any order: the oracle of the kernels.

Every CTA is a generator over one shared memory of the plan's layout that yields wherever another CTA could come
between: after every tile added or read, every arrival, every turn of a wait, every zeroing. `run` interleaves them in
an order of choice, and raises ScheduleError when all are stuck. What one CTA writes all others see at once; that the
GPU's fences make it so is not tested here.
"""

import random
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dlr_lock.triton_kernels import ACTIVATIONS, ChainWeights
from dlr_lock.triton_kernels.decode_plan import LINE, RING, DecodePlan

STUCK = "stuck"  # what a CTA yields when it waits in vain; anything else is progress


class ScheduleError(RuntimeError):
    """A deadlock."""


@dataclass(frozen=True)
class Launch:
    """What a launch reads, the y [T, d] that it writes, and its memory."""

    x: Tensor
    chain: ChainWeights
    plan: DecodePlan
    y: Tensor
    values: Tensor
    counters: Tensor


class Cta:
    """What both schedules share. Phases are methods, so that a test can break one."""

    def __init__(self, launch: Launch, cta: int) -> None:
        self.launch, self.plan, self.tokens = launch, launch.plan, len(launch.x)
        self.part, self.group = divmod(cta, launch.plan.groups)
        self.columns = slice(
            self.group * self.plan.width, min((self.group + 1) * self.plan.width, self.plan.hidden)
        )
        self.z = launch.x[:, self.columns].to(launch.values.dtype)

    def act(self, p: Tensor) -> Tensor:
        return ACTIVATIONS[self.launch.chain.act](p)

    def arrive(self, counter: int) -> Iterator[str]:
        self.launch.counters[counter] += 1
        yield "arrived"

    def wait(self, counter: int, target: int) -> Iterator[str]:
        while self.launch.counters[counter] < target:
            yield STUCK
        yield "passed"

    def add(self, where: Tensor, what: Tensor) -> Iterator[str]:
        for into, value in zip(where.split(16, -1), what.split(16, -1), strict=True):
            into += value
            yield "added"

    def read(self, where: Tensor) -> Generator[str, None, Tensor]:
        parts = []
        for part in where.split(16, -1):
            parts.append(part.clone())
            yield "read"
        return torch.cat(parts, -1)

    def write(self) -> None:
        chain, columns = self.launch.chain, self.columns
        delta = self.z - self.launch.x[:, columns].to(self.z.dtype)
        self.launch.y[:, columns] = (delta * chain.scale[columns] + chain.bias[columns]).to(
            self.launch.y.dtype
        )


class OneToken(Cta):
    """A CTA of the kernel of one token."""

    def __iter__(self) -> Iterator[str]:
        plan = self.plan
        sums = self.launch.values[: plan.depth * plan.rank].view(plan.depth, plan.rank)
        A, B = self.launch.chain.A[0], self.launch.chain.B[0]
        for k in range(self.plan.depth):
            yield from self.add(sums[k], (self.z @ A[k, :, self.columns].T)[0])
            yield from self.arrive(0)
            yield from self.wait(0, (k + 1) * self.plan.groups)
            p = yield from self.read(sums[k])
            self.z = self.z + self.act(p) @ B[k, :, self.columns]
        self.write()


class Tokens(Cta):
    """A CTA of the kernel of several tokens."""

    ring = RING

    def __iter__(self) -> Iterator[str]:
        plan = self.plan
        rows = slice(self.part * plan.rows, min((self.part + 1) * plan.rows, plan.rank))
        A, B = (w[0][:, rows, self.columns] for w in self.launch.chain.weights)
        here, there = self.part * LINE, (plan.parts + self.group) * LINE
        for k in range(plan.depth):
            p = self.sums(k)[: self.tokens, : rows.stop - rows.start]
            yield from self.add(p, self.z @ A[k].T)
            yield from self.arrive(here)
            yield from self.wait(here, (k + 1) * plan.groups)
            h = self.act((yield from self.read(p)))
            yield from self.zero(self.sums(k - 1), self.group, plan.groups)
            u = self.updates(k)[: self.tokens, : self.z.shape[1]]
            yield from self.add(u, h @ B[k])
            yield from self.arrive(there)
            yield from self.wait(there, (k + 1) * plan.parts)
            self.z = self.z + (yield from self.read(u))
            yield from self.zero(self.updates(k - 1), self.part, plan.parts)
        if self.part == 0:
            self.write()

    def sums(self, k: int) -> Tensor:
        """The part's buffer of P of step k, [tokens, rows]."""
        size = self.plan.tokens * self.plan.rows
        start = (self.part * RING + k % self.ring) * size
        return self.launch.values[start : start + size].view(self.plan.tokens, self.plan.rows)

    def updates(self, k: int) -> Tensor:
        """The group's buffer of the update of step k, [tokens, width]."""
        plan = self.plan
        size = plan.tokens * plan.width
        start = plan.parts * RING * plan.tokens * plan.rows + (self.group * RING + k % self.ring) * size
        return self.launch.values[start : start + size].view(plan.tokens, plan.width)

    def zero(self, buffer: Tensor, share: int, shares: int) -> Iterator[str]:
        """One of the shares of a buffer becomes zero."""
        each = -(-buffer.numel() // shares)
        buffer.view(-1)[share * each : (share + 1) * each] = 0
        yield "zeroed"


# (CTAs not known to be stuck, steps taken by each, the one that ran last) -> the one that runs next
Order = Callable[[list[int], list[int], int], int]


def orders(seed: int) -> dict[str, Order]:
    """Orders that a schedule must survive."""
    shuffled = random.Random(seed)
    return {
        "round robin": lambda ready, _, last: min(ready, key=lambda c: (c <= last, c)),
        "reversed": lambda ready, _, last: max(ready, key=lambda c: (c < last, c)),
        "random": lambda ready, _, last: shuffled.choice(ready),
        "one runs as far as it can": lambda ready, _, last: last if last in ready else ready[0],
        "the last ones starve": lambda ready, *_: ready[0],
        "the first ones starve": lambda ready, *_: ready[-1],
        "slowest first": lambda ready, steps, _: min(ready, key=lambda c: steps[c]),
    }


def run(
    x: Tensor, chain: ChainWeights, plan: DecodePlan, *, order: Order, cta: type[Cta] | None = None
) -> Tensor:
    """y [T, d] of one launch, with the arguments of `decode`, its CTAs interleaved by `order`.

    Raises ScheduleError on a deadlock.
    """
    y = torch.full_like(x, torch.nan)
    values, counters = (
        torch.zeros(plan.values, dtype=torch.float64),
        torch.zeros(plan.counters, dtype=torch.int32),
    )
    launch = Launch(x, chain, plan, y, values, counters)
    made = cta or (OneToken if plan.tokens == 1 else Tokens)
    ctas = {i: iter(made(launch, i)) for i in range(plan.ctas)}
    stuck: set[int] = set()
    steps, last = [0] * len(ctas), -1
    while ctas:
        ready = [c for c in ctas if c not in stuck]
        if not ready:
            raise ScheduleError(f"a deadlock: the CTAs {list(ctas)} wait in vain")
        last = order(ready, steps, last)
        steps[last] += 1
        event = next(ctas[last], None)
        if event is None:
            del ctas[last]
        if event == STUCK:
            stuck.add(last)
        else:
            stuck.clear()
    return y
