"""What the lock costs, counted: linear where the attack is naive, and how far every attacker's best brings it down."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dlr_lock.audit.asymmetry import Asymmetry, asymmetries
from dlr_lock.audit.meters import StepCounts, StepSeconds
from dlr_lock.audit.strategies.compare import OBJECTIVES, Objective, best_cost, compare_best, measured
from dlr_lock.audit.strategies.slot import SlotVariant, StrategyCost, slot_cost, slot_costs, slot_variants
from dlr_lock.common.errors import DLRError
from dlr_lock.runtime import DLRSpec
from dlr_lock.triton_kernels.meter import Counts

HIDDEN, WIDTH, TOKENS = 2048, 8192, 512
CHAINS = [(1, 16), (1, 64), (1, 256), (4, 64), (16, 48)]  # lanes x steps, all of 12288 units


def pair(lanes: int, depth: int) -> tuple[DLRSpec, SlotVariant, SlotVariant]:
    spec = DLRSpec.matching(HIDDEN, WIDTH, mlp_gated=True, lanes=lanes, depth=depth)
    assert (spec.lanes, spec.depth) == (lanes, depth) and lanes * depth * spec.rank == 12288
    return spec, *slot_variants(spec, WIDTH, tokens=TOKENS, dtype=torch.float32, device=torch.device("cpu"))


def counted(variant: SlotVariant, strategy: str) -> StepCounts:
    counts = slot_cost(variant, variant.strategy(strategy)).counts
    assert counts is not None
    return counts


@pytest.mark.parametrize(("lanes", "depth"), CHAINS)
def test_ratios_at_parity(lanes: int, depth: int) -> None:
    """Naive training keeps L K d + 3f against d + 4f, at the same FLOPs; inversion less than the MLP's."""
    with FakeTensorMode():
        spec, locked, original = pair(lanes, depth)
        ours, theirs = counted(locked, "plain"), counted(original, "plain")
        inverted = counted(locked, "inversion") if depth <= 64 else None  # seconds to count, and no news
    formula = (spec.lanes * spec.depth * HIDDEN + 3 * WIDTH) / (HIDDEN + 4 * WIDTH)
    assert 0.85 * formula < ours.held / theirs.held < 1.05 * formula  # lanes share the first state, x
    assert ours.flops == theirs.flops
    if inverted is not None:
        assert inverted.held == 4 * TOKENS * (lanes * HIDDEN + 12288)
        assert inverted.flops == pytest.approx(7 / 6 * theirs.flops)
        assert inverted.held < 0.65 * theirs.held or lanes > 4
    # Every step waits for the one before: two launches forward and three backward at least, against an MLP's few.
    assert 2 * depth < ours.forward.dependent < 4 * depth + 10
    assert 3 * depth < ours.backward.dependent < 5 * depth + 15
    assert theirs.forward.dependent <= 5 and theirs.backward.dependent <= 8


def test_what_naive_training_keeps_grows_linearly_in_lanes_times_steps() -> None:
    """At a rank of 16: with r fixed, each further step of each lane keeps d + 2 r more."""
    held = {}
    with FakeTensorMode():
        for lanes, depth in ((1, 8), (1, 16), (1, 32), (2, 16), (4, 8)):
            spec = DLRSpec(256, lanes, depth, 16)
            variant, _ = slot_variants(
                spec, 64, tokens=TOKENS, dtype=torch.float32, device=torch.device("cpu")
            )
            held[lanes, depth] = counted(variant, "plain").held / (4 * TOKENS)
    step = 256 + 2 * 16
    assert held[1, 32] - held[1, 16] == 2 * (held[1, 16] - held[1, 8]) == 16 * step
    for lanes, depth in held:  # all lanes read the same x first: it is kept once
        assert held[lanes, depth] == lanes * depth * step - (lanes - 1) * 256 + 256


def test_best_strategies_and_their_limits() -> None:
    """On SmolLM2's slot: what the lock costs an attacker who has read this program, in a model of 30 layers."""
    spec = DLRSpec.matching(576, 1536, mlp_gated=True, depth=16)
    with FakeTensorMode():
        pair = slot_variants(spec, 1536, tokens=2048, dtype=torch.bfloat16, device=torch.device("cpu"))
        locked, original = map(slot_costs, pair)
    table = {(c.trainable, str(c.objective)): c for c in compare_best(locked, original, layers=30)}
    assert set(trainable for trainable, _ in table) == {"weights", "adapters", "nothing"}
    naive = {r.strategy: r for r in locked}["plain"].memory(30) / original[0].memory(30)  # type: ignore[operator]
    free = table["weights", "least memory at 1.02 x flops"]
    redone = table["weights", "least memory at 1.19 x flops"]
    any_price = table["weights", "least memory"]
    assert free.ratio is not None and redone.ratio is not None and any_price.ratio is not None
    assert naive > 2 and free.ratio > 3  # plain autograd against each side's best
    assert redone.ratio < 1.1  # at half a forward's FLOPs more there is nothing left of it
    assert any_price.ratio < 1.3
    assert table["weights", "least flops"].ratio == 1
    frozen = table["nothing", "least flops"]
    assert frozen.locked is not None and frozen.original is not None
    assert frozen.locked.memory(30) < frozen.original.memory(30)  # type: ignore[operator]
    assert table["weights", "least seconds"].locked is None  # nothing was timed
    for comparison in table.values():
        for row in (comparison.locked, comparison.original):
            assert row is None or row.trainable == comparison.trainable
    base = original[0]
    for row in locked:  # nobody else meets the limit for less
        if row.trainable == "weights" and measured(row, "flops") <= 1.02 * 7 / 6 * measured(base, "flops"):  # type: ignore
            assert redone.locked is not None and redone.locked.memory(30) <= row.memory(30)  # type: ignore[operator]


def made_up(name: str, held: int, peak: int, flops: int, seconds: float | None = None) -> StrategyCost:
    counts = StepCounts(Counts(flops // 3, 1, 1), Counts(flops - flops // 3, 2, 2), held, held, peak)
    return StrategyCost(name, "weights", held, counts, seconds and StepSeconds(seconds, seconds, 0.0))


def test_the_best_row_meets_every_limit() -> None:
    base = made_up("plain", 100, 150, 300, 3.0)
    lean, slow = made_up("lean", 10, 200, 330, 1.0), made_up("slow", 1, 210, 900, 9.0)
    rows = [
        base,
        lean,
        slow,
        StrategyCost("compiled", "weights", 5),
        StrategyCost("failed", "weights", error="no compiler"),
    ]
    assert best_cost(rows, Objective("memory"), base) is base
    assert best_cost(rows, Objective("memory"), base, layers=10) is slow
    assert best_cost(rows, Objective("memory", {"flops": 1.1}), base, layers=10) is lean
    assert best_cost(rows, Objective("memory", {"flops": 1.0, "seconds": 1.0}), base, layers=10) is base
    assert (
        best_cost(rows, Objective("seconds")) is lean
        and best_cost(rows, Objective("flops", {"memory": 0.1}), base) is None
    )
    assert lean.memory(10) == 9 * 10 + 200
    with pytest.raises(DLRError, match="no measure 'speed'"):
        Objective("speed")
    with pytest.raises(DLRError, match="wants a plain step"):
        best_cost(rows, Objective("memory", {"flops": 1.0}))
    assert str(OBJECTIVES[1]) == "least memory at 1.19 x flops"


def found(table: list[Asymmetry], mode: str, measure: str, forward: str) -> float:
    (value,) = (a.value for a in table if (a.mode, a.measure, a.forward) == (mode, measure, forward))
    return value


def test_asymmetry_by_counts() -> None:
    """Plain FLOPs know none; dependent launches only against the runtime's forward."""
    spec = DLRSpec.matching(128, 512, mlp_gated=True, depth=12)
    with FakeTensorMode():
        pair = slot_variants(spec, 512, tokens=512, dtype=torch.bfloat16, device=torch.device("cpu"))
        table = asymmetries(*pair)
    assert {a.mode for a in table} == {"eager", "checkpointed", "best"}  # compiled code is timed, not counted
    assert {a.measure for a in table} == {"flops", "launches", "dependent"}
    assert found(table, "eager", "flops", "reference") == 1
    assert 1 < found(table, "checkpointed", "flops", "reference") < 1.25
    assert found(table, "best", "flops", "reference") == 1
    assert found(table, "eager", "dependent", "reference") < 1
    for mode in ("eager", "checkpointed", "best"):
        by_runtime, by_reference = (found(table, mode, "dependent", f) for f in ("runtime", "reference"))
        assert by_runtime > 2 * by_reference
        assert found(table, mode, "flops", "runtime") < found(table, mode, "flops", "reference")


def test_asymmetry_by_seconds_has_all_modes() -> None:
    """Of a tiny slot, for the modes that need no compiler: that there are times, not what they are."""
    spec = DLRSpec(32, 1, 3, 16)
    locked, original = slot_variants(spec, 48, tokens=8, dtype=torch.float32, device=torch.device("cpu"))
    plain = [replace(a, strategies=[p for p in a.strategies if not p.compiled]) for a in (locked, original)]
    table = [a for a in asymmetries(*plain, repeats=1) if a.measure == "seconds"]
    assert {(a.mode, a.forward) for a in table} == {
        (mode, forward) for mode in ("eager", "checkpointed", "best") for forward in ("reference", "runtime")
    }
    assert all(a.value > 0 for a in table)
