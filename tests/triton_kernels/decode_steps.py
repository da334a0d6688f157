"""The decode kernel's schedule in plain torch, one CTA at a time, in any order: the oracle of the kernel.

Every CTA is a generator over one shared memory of the plan's layout that yields wherever another CTA could
come between: after every tile added or read, every arrival, every turn of a wait, every zeroing. `run`
interleaves them in an order of choice, and raises ScheduleError when all are stuck or when the memory is not
left as it was found. What one CTA writes all others see at once; that the GPU's fences make it so is not
tested here.
"""

import random
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlr_lock.triton_kernels import ACTIVATIONS, ChainWeights
from dlr_lock.triton_kernels.decode_plan import LINE, RING, DecodePlan

STUCK = "stuck"  # what a CTA yields when it waits in vain; anything else is progress


class ScheduleError(RuntimeError):
    """The schedule is wrong: a deadlock, or memory that the next launch would find dirty."""


@dataclass
class Memory:
    """A plan's workspace in host memory. Launches follow each other on it, as on the device."""

    plan: DecodePlan
    dtype: torch.dtype = torch.float64
    values: Tensor = field(init=False)
    counters: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.values = torch.zeros(self.plan.values, dtype=self.dtype)
        # What need not be zero is poisoned: nothing may be read before it is written.
        self.values[self.plan.zeroed :] = torch.nan
        self.counters = torch.zeros(self.plan.counters, dtype=torch.int32)

    def check_clean(self) -> None:
        """Raises ScheduleError unless the next launch finds what this one found."""
        dirty = self.values[: self.plan.zeroed].ne(0).nonzero()
        if len(dirty) or self.counters.any():
            raise ScheduleError(
                f"{len(dirty)} values, the first at {dirty[:1].flatten().tolist()}, and the counters "
                f"{self.counters.nonzero().flatten().tolist()} are left dirty"
            )


def columns(plan: DecodePlan, cta: int) -> slice:
    """The columns of CTA `cta` of a lane; the last slice may have fewer."""
    first = cta * plan.slice_width
    return slice(first, min(first + plan.slice_width, plan.hidden))


def part_rows(plan: DecodePlan, part: int) -> slice:
    """The rows of a part of a step; the last part may have fewer than `plan.part`."""
    return slice(part * plan.part, min((part + 1) * plan.part, plan.rank))


def round_steps(plan: DecodePlan, n: int) -> range:
    """The steps of round n."""
    return range(n * plan.steps, min((n + 1) * plan.steps, plan.depth))


@dataclass(frozen=True)
class Launch:
    """What a launch reads, as `decode` takes it, and the y [T, d] that it writes."""

    x: Tensor
    chain: ChainWeights
    gram: Tensor | None
    y: Tensor


class Cta:
    """One CTA of the kernel. Its phases are methods, so that a test can break one."""

    def __init__(self, plan: DecodePlan, memory: Memory, launch: Launch, lane: int, cta: int) -> None:
        self.plan, self.memory, self.launch, self.lane, self.cta = plan, memory, launch, lane, cta
        self.chain = launch.chain
        self.columns = columns(plan, cta)
        self.tokens = len(launch.x)
        self.barrier, self.exit, self.turn = lane * LINE, plan.exits + lane * LINE, plan.turns + cta * LINE
        self.z = self.slice_of(launch.x).to(memory.dtype, copy=True)
        if plan.chunks > 1:
            scratch = memory.values[plan.z_start :].view(plan.lanes, plan.tokens, plan.hidden)
            scratch = scratch[lane, : self.tokens, self.columns]
            self.z = scratch.copy_(self.z)

    def __iter__(self) -> Iterator[str]:
        """The whole kernel."""
        for n in range(self.plan.rounds):
            ps = self.project(n)
            if self.plan.slices > 1:
                yield from self.publish(n, ps)
                yield from self.arrive()
                yield from self.wait(n)
                ps = yield from self.gather(n)
                yield from self.clear(n - 1)
            self.update(n, self.solve(n, ps))
        yield from self.finish()
        if self.plan.slices > 1:
            yield from self.leave()

    def p_start(self, n: int, slot: int) -> int:
        """Where a slot of this lane's P of round n starts in the values."""
        return (self.lane * RING + n % RING) * self.plan.p_buffer + slot * self.plan.p_slot

    def arrivals(self, n: int) -> int:
        """What the lane's barrier counter holds once round n's P is complete."""
        return (n + 1) * self.plan.slices

    def tiles(self) -> Iterator[slice]:
        """The tiles of the slice, as columns of the slice."""
        width = self.columns.stop - self.columns.start
        for chunk in range(self.plan.chunks):
            yield slice(min(chunk * self.plan.tile, width), min((chunk + 1) * self.plan.tile, width))

    def slice_of(self, t: Tensor) -> Tensor:
        """This CTA's columns of [..., d]."""
        return t[..., self.columns]

    def project(self, n: int) -> dict[int, Tensor]:
        """This slice's share of P of round n: tile -> [T, rows of the part]."""
        ps = {}
        for i, k in enumerate(round_steps(self.plan, n)):
            w = self.slice_of(self.chain.A[self.lane, k])
            z = self.z.to(w.dtype)
            p = torch.stack([z[:, t] @ w[:, t].T for t in self.tiles()]).sum(0).to(self.z.dtype)
            for part in range(self.plan.parts):
                ps[i * self.plan.parts + part] = p[:, part_rows(self.plan, part)]
        return ps

    def part(self, n: int, slot: int, tile: int) -> Tensor:
        """A tile [T, rows of the part] of the lane's P."""
        start = self.p_start(n, slot)
        tiles = self.memory.values[start : start + self.plan.p_slot]
        tiles = tiles.view(self.plan.p_tiles, self.plan.tokens, self.plan.part)
        rows = part_rows(self.plan, tile % self.plan.parts)
        return tiles[tile, : self.tokens, : rows.stop - rows.start]

    def publish(self, n: int, ps: dict[int, Tensor]) -> Iterator[str]:
        for tile, p in ps.items():
            if self.plan.deterministic:
                self.part(n, self.cta, tile).copy_(p)
            else:
                self.part(n, 0, tile).add_(p)
            yield "added"

    def arrive(self) -> Iterator[str]:
        self.memory.counters[self.barrier] += 1
        yield "arrived"

    def wait(self, n: int) -> Iterator[str]:
        while self.memory.counters[self.barrier] < self.arrivals(n):
            yield STUCK
        yield "passed"

    def gather(self, n: int) -> Generator[str, None, dict[int, Tensor]]:
        """P of round n, complete: tile -> [T, rows of the part], the generator's value."""
        ps = {}
        for tile in range(len(round_steps(self.plan, n)) * self.plan.parts):
            slots = [self.part(n, slot, tile) for slot in range(self.plan.p_slots)]
            ps[tile] = torch.stack(slots).sum(0)
            yield "read"
        return ps

    def clear(self, n: int) -> Iterator[str]:
        """This CTA's share of round n's buffer becomes zero."""
        if not self.plan.deterministic:
            buffer = self.memory.values[self.p_start(n, 0) :][: self.plan.p_buffer]
            buffer[self.cta * self.plan.p_share :][: self.plan.p_share] = 0
            yield "cleared"

    def solve(self, n: int, ps: dict[int, Tensor]) -> list[Tensor]:
        """h_i [T, r] of round n's steps, in the weights' dtype."""
        act, gram = ACTIVATIONS[self.chain.act], self.launch.gram
        rank, first = self.plan.rank, n * self.plan.steps
        hs: list[Tensor] = []
        for i in range(len(round_steps(self.plan, n))):
            p = torch.cat([ps[i * self.plan.parts + part] for part in range(self.plan.parts)], 1)
            for j, h in enumerate(hs):
                assert gram is not None  # `check` refuses rounds of several steps without
                block, step = divmod(first, gram.shape[-1] // rank)
                rows, columns = ((step + s) * rank for s in (j, i))
                p += h @ gram[self.lane, block, rows : rows + rank, columns : columns + rank]
            hs.append(act(p).to(self.chain.A.dtype))
        return hs

    def update(self, n: int, hs: list[Tensor]) -> None:
        for h, k in zip(hs, round_steps(self.plan, n), strict=True):
            for t in self.tiles():
                self.z[:, t] += (h @ self.slice_of(self.chain.B[self.lane, k])[:, t]).to(self.z.dtype)

    def finish(self) -> Iterator[str]:
        """y of the slice: at once where there is one lane, else by the last lane to arrive."""
        plan, memory = self.plan, self.memory
        delta = self.z - self.slice_of(self.launch.x).to(memory.dtype)
        if plan.lanes == 1:
            self.write(delta)
            return
        sums = memory.values[plan.y_start : plan.z_start].view(plan.y_slots, plan.tokens, plan.hidden)
        sums = sums[:, : self.tokens, self.columns]
        for t in self.tiles():
            if plan.deterministic:
                sums[self.lane, :, t] = delta[:, t]
            else:
                sums[0, :, t] += delta[:, t]
            yield "summed"
        memory.counters[self.turn] += 1
        last = memory.counters[self.turn] == plan.lanes
        yield "turned"
        if last:
            self.write(sums.sum(0))
            if not plan.deterministic:
                sums.zero_()
            memory.counters[self.turn] = 0
            yield "wrote"

    def write(self, delta: Tensor) -> None:
        self.slice_of(self.launch.y).copy_(
            delta * self.slice_of(self.chain.scale) + self.slice_of(self.chain.bias)
        )

    def leave(self) -> Iterator[str]:
        self.memory.counters[self.exit] += 1
        last = self.memory.counters[self.exit] == self.plan.slices
        yield "left"
        if last:
            if not self.plan.deterministic:
                for tile in range(self.plan.p_tiles):
                    self.part(self.plan.rounds - 1, 0, tile).zero_()
                    yield "cleared"
            self.memory.counters[self.barrier] = 0
            yield "reset"
            self.memory.counters[self.exit] = 0


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
    x: Tensor, chain: ChainWeights, gram: Tensor | None, *, plan: DecodePlan, memory: Memory, order: Order,
    cta: type[Cta] = Cta,
) -> Tensor:  # fmt: skip
    """y [T, d] of one launch, with the arguments of `decode`, its CTAs interleaved by `order`.

    Raises ScheduleError on a deadlock, or when the memory is not left clean.
    """
    plan.check(x, chain, gram)
    y = torch.full_like(x, torch.nan)
    launch = Launch(x, chain, gram, y)
    grid = [(lane, c) for lane in range(plan.lanes) for c in range(plan.slices)]
    ctas = {i: iter(cta(plan, memory, launch, *place)) for i, place in enumerate(grid)}
    stuck: set[int] = set()
    steps, last = [0] * len(ctas), -1
    while ctas:
        ready = [c for c in ctas if c not in stuck]
        if not ready:
            raise ScheduleError(f"a deadlock: the CTAs {[grid[c] for c in ctas]} (lane, slice) wait in vain")
        last = order(ready, steps, last)
        steps[last] += 1
        event = next(ctas[last], None)
        if event is None:
            del ctas[last]
        if event == STUCK:
            stuck.add(last)
        else:
            stuck.clear()
    memory.check_clean()
    return y
