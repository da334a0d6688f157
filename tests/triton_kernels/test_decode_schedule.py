"""The decode kernels' schedules, in every order of their CTAs, and broken ones, which are found."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from decode_calls import Call, assert_same, make_call, make_plan, wanted
from decode_steps import Cta, OneToken, ScheduleError, Tokens, orders, run

from dlr_lock.runtime.spec import DLRSpec
from dlr_lock.triton_kernels.decode_plan import DecodePlan, plan_decode
from dlr_lock.triton_kernels.gpu import H200
from dlr_lock.triton_kernels.rounds import Shape

ONE = make_plan(6, 40, 80, tokens=1, rows=16, columns=16)  # five CTAs, ragged rows
SOME = make_plan(
    6, 40, 80, tokens=16, rows=16, columns=16, tiles=2
)  # three parts of three groups, all ragged
PLANS = {"one token": (ONE, 1), "several": (SOME, 3)}


@pytest.mark.parametrize("name", PLANS)
def test_every_order_gives_the_chain(name: str) -> None:
    plan, T = PLANS[name]
    for number, order in enumerate(orders(0)):
        call = make_call(plan, T, seed=number)
        assert_same(run(*call, plan, order=orders(number)[order]), wanted(call), 1e-12)


def test_shapes_at_random() -> None:
    """The same ones every time."""
    draw = torch.Generator().manual_seed(0)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    for case in range(40):
        tokens = pick(1, 16)
        plan = make_plan(
            pick(1, 2, 5, 9), pick(16, 40, 48), pick(16, 33, 112), tokens=tokens, rows=pick(16, 32),
            columns=pick(16, 32), tiles=1 if tokens == 1 else pick(1, 2),
        )  # fmt: skip
        call = make_call(plan, min(tokens, pick(1, 2, 16)), seed=case, act="gelu")
        assert_same(run(*call, plan, order=orders(case)["random"]), wanted(call), 1e-12)


def fails(plan: DecodePlan, call: Call, order: str, cta: type[Cta]) -> bool:
    try:
        y = run(*call, plan, order=orders(0)[order], cta=cta)
    except ScheduleError:
        return True
    return not torch.allclose(y, wanted(call))


class NoWait:
    def wait(self, counter: int, target: int) -> Iterator[str]:
        yield "passed"


class WaitsForTooMany(Cta):
    def wait(self, counter: int, target: int) -> Iterator[str]:
        yield from super().wait(counter, target + 1)


class TwoBuffers(Tokens):
    ring = 2


class ZeroesAtOnce(Tokens):
    """The buffer that was just read, and that a slower CTA may be reading still."""

    def zero(self, buffer: torch.Tensor, share: int, shares: int) -> Iterator[str]:
        after = self.sums if buffer.shape[1] == self.plan.rows else self.updates
        self.now = getattr(self, "now", -1) + 1
        yield from super().zero(after(self.now // 2), share, shares)


class NeverZeroes(Tokens):
    def zero(self, *what: object) -> Iterator[str]:
        yield "kept"


BROKEN = [
    (ONE, 1, type("OneTokenNoWait", (NoWait, OneToken), {})),
    (ONE, 1, type("OneTokenTooMany", (WaitsForTooMany, OneToken), {})),
    (SOME, 3, type("TokensNoWait", (NoWait, Tokens), {})),
    (SOME, 3, type("TokensTooMany", (WaitsForTooMany, Tokens), {})),
    (SOME, 3, TwoBuffers),
    (SOME, 3, NeverZeroes),
    (SOME, 3, ZeroesAtOnce),
]


@pytest.mark.parametrize(("plan", "T", "mutant"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_schedule_is_found(plan: DecodePlan, T: int, mutant: type[Cta]) -> None:
    """Each of these is wrong in some order; the schedule itself never."""
    call = make_call(plan, T)
    assert any(fails(plan, call, order, mutant) for order in orders(0))


MLPS = [(576, 1536), (1024, 3072), (1536, 8960), (2048, 8192), (2560, 9728), (3072, 8192), (4096, 14336),
        (5120, 25600), (8192, 28672)]  # fmt: skip


@pytest.mark.parametrize("mlp", MLPS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 64])
def test_a_plan_holds_all_once_and_fits_the_device(mlp: tuple[int, int], tokens: int) -> None:
    spec = DLRSpec.matching(*mlp, mlp_gated=True)
    plan = plan_decode(Shape(*spec.weight_shape, tokens), H200)
    if plan is None:
        assert tokens > 16 and spec.hidden_size >= 4096  # the state does not fit the registers
        return
    assert plan.ctas <= H200.sms and plan.tokens >= tokens
    assert (plan.groups - 1) * plan.width < spec.hidden_size <= plan.groups * plan.width
    assert (plan.parts - 1) * plan.rows < spec.rank <= plan.parts * plan.rows
    assert 1 <= plan.held <= plan.tiles
    if spec.hidden_size > 1024:
        assert plan.ctas >= 88  # 80 or so take all of the memory's bandwidth


@pytest.mark.parametrize("tokens", [1, 16])
def test_a_plan_of_any_width_fits_the_device(tokens: int) -> None:
    for hidden in range(16, 4400, 8):
        plan = plan_decode(Shape(1, 12, 192, hidden, tokens), H200)
        assert plan is not None and plan.ctas <= H200.sms and plan.groups * plan.width >= hidden


def test_what_has_no_plan() -> None:
    shape = Shape(1, 12, 192, 576, 1)
    assert plan_decode(shape, H200) is not None
    for changes in (
        {"lanes": 2},
        {"tokens": 65},
        {"tokens": 2, "itemsize": 4},
        {"depth": 2**15},
        {"tokens": 0},
    ):
        assert plan_decode(replace(shape, **changes), H200) is None
