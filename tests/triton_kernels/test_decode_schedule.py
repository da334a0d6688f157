"""The decode kernel's schedule in every order, against the definition; and the plans that it runs by."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from decode_calls import Call, assert_same, make_call, make_plan, stored_gram, wanted
from decode_steps import STUCK, Cta, Memory, ScheduleError, columns, orders, part_rows, run

from dlr_lock.triton_kernels.decode_plan import DecodePlan

ORDERS = tuple(orders(0))
PLANS = [  # L, K, r, d, S, C, T, options
    (1, 1, 16, 16, 1, 1, 1, {}),
    (1, 7, 16, 100, 3, 4, 1, {}),  # a ragged last round and a ragged last slice
    (1, 8, 48, 96, 4, 3, 5, {}),
    (3, 5, 16, 72, 2, 1, 3, {"tile": 32}),  # one CTA a lane, its slice in three tiles
    (2, 4, 16, 80, 2, 2, 17, {"tokens": 32, "tile": 16}),
    (2, 5, 16, 64, 2, 4, 4, {}),
    (8, 3, 16, 48, 1, 3, 2, {}),
    (8, 4, 16, 64, 4, 4, 2, {}),
    (1, 12, 16, 64, 1, 4, 2, {}),
    (1, 6, 48, 64, 3, 4, 2, {"part": 16}),
    (2, 5, 80, 48, 2, 3, 3, {"part": 32}),  # a ragged last part
    (1, 3, 100, 80, 1, 2, 1, {"part": 32}),  # as 336 in parts of 64 or 128: a step a round
    (2, 4, 40, 64, 2, 2, 5, {"part": 32}),
    (1, 4, 41, 72, 4, 1, 2, {"part": 16, "tile": 32}),
]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", PLANS, ids=str)
def test_schedule_in_every_order(case: tuple, deterministic: bool) -> None:
    """Three launches on one workspace, in every order, against the definition."""
    L, K, r, d, S, C, T, options = case
    plan = make_plan(L, K, r, d, S, C, deterministic=deterministic, **options)
    memory = Memory(plan)
    for launch, name in enumerate(ORDERS):
        call = make_call(plan, T, seed=launch)
        y = run(*call, plan=plan, memory=memory, order=orders(launch)[name])
        assert_same(y, wanted(call), 1e-12)


def test_schedule_random() -> None:
    """Shapes and orders at random, the same ones every time."""
    draw = torch.Generator().manual_seed(0)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    for case in range(40):
        L, K, S = pick(1, 2, 3), pick(1, 2, 5, 6, 9), pick(1, 2, 3, 4)
        r, d = pick(16, 32, 48), pick(16, 33, 64, 112, 130)
        C = math.ceil(d / (16 * math.ceil(d / pick(1, 2, 3, 5) / 16)))
        options = {"deterministic": bool(pick(0, 0, 1)), "tile": pick(0, 16, 32)}
        options["part"] = pick(16, 32, 64)
        plan = make_plan(L, K, r, d, S, C, **options)
        call = make_call(plan, pick(1, 2, 16), seed=case, blocks=pick(1, 3), act="gelu")
        y = run(*call, plan=plan, memory=Memory(plan), order=orders(case)["random"])
        assert_same(y, wanted(call), 1e-12)


class NoWait(Cta):
    def wait(self, n: int) -> Iterator[str]:
        yield "passed"


class EarlyReset(Cta):
    """Whoever passes the last wait first resets the counter."""

    def wait(self, n: int) -> Iterator[str]:
        yield from super().wait(n)
        if n == self.plan.rounds - 1:
            self.memory.counters[self.barrier] = 0


class EarlyClear(Cta):
    """Zeroes the buffer that is being read."""

    def clear(self, n: int) -> Iterator[str]:
        yield from super().clear(n + 1)


class NoClear(Cta):
    def clear(self, n: int) -> Iterator[str]:
        yield "kept"


class WaitsForTooMany(Cta):
    def wait(self, n: int) -> Iterator[str]:
        while self.memory.counters[self.barrier] <= self.arrivals(n):
            yield STUCK


class NobodyLeaves(Cta):
    def leave(self) -> Iterator[str]:
        yield "gone"


def test_rounds_that_do_not_divide_a_block_of_all_steps() -> None:
    plan = make_plan(2, 7, 40, 64, 3, 2, part=32)
    x, chain, _ = call = make_call(plan, 2)
    gram = stored_gram(chain.A, chain.B, 7)
    y = run(x, chain, gram, plan=plan, memory=Memory(plan), order=orders(0)["random"])
    assert_same(y, wanted(call), 1e-12)
    with pytest.raises(ValueError, match="multiple of 120"):
        plan.check(x, chain, gram.expand(2, 2, -1, -1))


def broken_gram(call: Call) -> Call:
    """The Gram block of the second round with two of its steps swapped."""
    gram = call.gram.clone()
    half = gram.shape[-1] // 2
    gram[..., half:, half:] = gram[..., half:, half:].mT
    return call._replace(gram=gram)


@pytest.mark.parametrize("mutant", [NoWait, EarlyReset, EarlyClear, NoClear, WaitsForTooMany, NobodyLeaves])
def test_a_broken_schedule_is_found(mutant: type[Cta]) -> None:
    """Each of these is wrong in some order, or leaves the workspace dirty; the schedule itself never."""
    plan = make_plan(2, 8, 16, 64, 2, 4)
    call = make_call(plan, 2)
    assert not any(fails(plan, call, name, Cta) for name in ORDERS)
    assert any(fails(plan, call, name, mutant) for name in ORDERS)


def test_a_broken_gram_block_is_found() -> None:
    plan = make_plan(1, 8, 16, 64, 2, 4)
    assert fails(plan, broken_gram(make_call(plan, 2)), "round robin", Cta)


def fails(plan: DecodePlan, call: Call, order: str, cta: type[Cta]) -> bool:
    try:
        y = run(*call, plan=plan, memory=Memory(plan), order=orders(0)[order], cta=cta)
    except ScheduleError:
        return True
    return not torch.allclose(y, wanted(call))


def test_plan_chosen() -> None:
    """The plan's rule: all CTAs resident, every column held once, what cannot be is refused."""
    for L, d, sms, T in itertools.product((1, 8, 32), (576, 2048, 4096, 5120), (20, 132, 148), (1, 5, 64)):
        if sms < L:
            continue
        plan = DecodePlan.choose(lanes=L, depth=12, rank=48, hidden=d, tokens=T, sms=sms)
        assert plan.lanes * plan.slices <= sms
        assert plan.tokens >= T
        assert plan.tile * plan.chunks >= plan.slice_width
        slices = [columns(plan, c) for c in range(plan.slices)]
        assert [c.start for c in slices] == [0] + [c.stop for c in slices[:-1]]
        assert slices[-1].stop == d
        rows = [part_rows(plan, q) for q in range(plan.parts)]
        assert [q for part in rows for q in range(plan.rank)[part]] == list(range(plan.rank))
    with pytest.raises(ValueError, match="133 lanes do not fit 132"):
        DecodePlan.choose(lanes=133, depth=1, rank=16, hidden=64, tokens=1, sms=132)
    with pytest.raises(ValueError, match="65"):
        DecodePlan.choose(lanes=1, depth=1, rank=16, hidden=64, tokens=65, sms=132)
    with pytest.raises(ValueError, match="empty"):
        make_plan(1, 1, 16, 64, 1, 7)


@pytest.mark.parametrize(
    ("lanes", "depth", "rank", "hidden"),
    [(1, 32, 672, 4096), (1, 64, 336, 4096), (1, 128, 160, 4096), (8, 64, 48, 4096), (1, 64, 192, 2048)],
)
def test_weights_of_a_slice_are_requested_at_once(lanes: int, depth: int, rank: int, hidden: int) -> None:
    """At few tokens a slice is one tile, and a round as wide as its Gram tiles allow."""
    plan = DecodePlan.choose(lanes=lanes, depth=depth, rank=rank, hidden=hidden, tokens=1, sms=132)
    assert plan.chunks == 1
    assert plan.steps == (1 if rank > 192 else 2)
    assert plan.parts * plan.part < 1.34 * rank


def test_block_of_all_steps_is_shared_out_evenly() -> None:
    def steps(depth: int, block: int) -> int:
        plan = DecodePlan.choose(
            lanes=1, depth=depth, rank=16, hidden=2048, tokens=1, sms=132, block_steps=block
        )
        return plan.steps

    assert [steps(22, 22), steps(23, 32), steps(44, 22), steps(44, 24)] == [11, 8, 11, 8]
