"""The verdict: equal gain, the cheapest attack, and 'more than' where nothing got there."""

import math

import pytest
from audit_rows import run, step

from dlr_lock.audit.report import Run
from dlr_lock.audit.verdict import mean_curves, tokens_to, verdicts

STEPS = [
    step("original", "full", "plain", 30, 1000, 0.3),
    step("original", "full", "checkpoint", 40, 400),
    step("original", "LoRA", "plain", 20, 900, 0.2),
    step("locked", "full", "plain", 30, 4000, 0.9),
    step("locked", "full", "inversion", 35, 1500, 0.6),
    step("locked", "LoRA", "plain", 20, 3000, 0.5),
    step("redistilled", "full", "plain", 30, 1000, 0.3),
]
ORIGINAL = [run("original", "full", [6.0, 4.0, 3.0]), run("original", "LoRA", [6.0, 5.5, 5.2])]


def found(
    runs: list[Run], redistillation: float = 5000.0
) -> dict[tuple[float, str, int], tuple[float | None, bool, str]]:
    table = verdicts(runs, STEPS, {"redistilled": {"flops": redistillation, "seconds": 50.0}})
    return {
        (v.share, v.measure, v.tunes): (
            v.ratio,
            v.bound,
            v.locked.attack + ", " + v.locked.strategy if v.locked else "",
        )
        for v in table
    }


def test_the_cheapest_attack_at_equal_gain() -> None:
    """Best gain 3: half of it is a loss of 4.5, which full tuning has after 75 tokens on the original, after 150 on
    the locked model, after 100 once it is distilled back."""
    table = found(
        [*ORIGINAL, run("locked", "full", [7.0, 5.0, 4.0]), run("redistilled", "full", [6.5, 4.5, 3.0])]
    )
    base = 7.5 * 30
    assert table[0.5, "flops", 1] == (15 * 30 / base, False, "locked, full, plain")
    assert table[0.5, "seconds", 1] == (
        pytest.approx(15 * 0.6 / (7.5 * 0.3)),
        False,
        "locked, full, inversion",
    )
    assert table[0.5, "flops", 100] == (
        pytest.approx((10 * 30 + 50) / base),
        False,
        "redistilled, full, plain",
    )
    assert table[0.5, "peak", 1] == (1000 / 400, False, "redistilled, full, plain")  # the least on each side
    assert (0.5, "peak", 10) not in table  # memory is not shared


def test_not_reached_is_a_bound_of_what_was_spent_never_infinity() -> None:
    table = found([*ORIGINAL, run("locked", "full", [7.0, 6.0, 5.5]), run("locked", "LoRA", [7.0, 6.9, 6.8])])
    ratio, bound, attack = table[0.9, "flops", 1]
    assert bound and attack == "locked, LoRA, plain" and ratio is not None
    assert ratio == pytest.approx(
        20 * 20 / (30 * (100 + 70) / 10)
    )  # all 200 tokens of it; the original: 3.3 at 170


def test_memory_is_unknown_where_nothing_reached_the_target() -> None:
    table = verdicts([*ORIGINAL, run("locked", "full", [7.0, 6.0, 5.5])], STEPS, {})
    peak = [v for v in table if v.measure == "peak"]
    assert peak and all(v.locked is None and v.ratio is None for v in peak)


def test_a_gain_within_what_seeds_differ_by_is_none() -> None:
    noisy = [run("original", "full", [6.0, 5.99]), run("original", "full", [6.0, 5.5], seed=1)]
    assert verdicts([*noisy, run("locked", "full", [6.0, 5.0])], STEPS, {}) == []


def test_no_gain_no_verdict() -> None:
    assert verdicts([run("original", "full", [6.0, 6.1]), run("locked", "full", [6.0, 5.0])], STEPS, {}) == []
    assert verdicts([run("locked", "full", [6.0, 5.0])], STEPS, {}) == []


def test_the_mean_over_seeds_and_a_seed_that_diverged() -> None:
    runs = [
        run("locked", "full", [6.0, 5.0, 3.0]),
        run("locked", "full", [6.0, 4.0, 4.0], seed=1),
        run("locked", "full", [6.0, 0.0, 0.0], best=False),
        run("locked", "LoRA", [6.0, 5.0, 4.0]),
        run("locked", "LoRA", [6.0], seed=1),
    ]
    curves = mean_curves(runs)
    assert curves["locked", "full"] == ([0, 100, 200], [6.0, 4.5, 3.5])
    assert curves["locked", "LoRA"] == ([0, 100, 200], [6.0, math.inf, math.inf])
    assert tokens_to(curves["locked", "LoRA"], 5.9) is None


def test_tokens_to() -> None:
    curve = [0, 100, 300], [6.0, 5.0, 4.0]
    assert tokens_to(curve, 6.5) == 0 and tokens_to(curve, 5.25) == 75 and tokens_to(curve, 4.5) == 200
    assert tokens_to(curve, 3.9) is None
    assert tokens_to(([0, 100, 200], [6.0, math.inf, 3.0]), 4.0) == 200
