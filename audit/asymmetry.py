"""The lock's promise as a ratio: (backward / forward) of the locked slot over (backward / forward) of the original.

In four modes, because eager alone measures a missing kernel, not the lock:

eager          plain autograd on both sides
compiled       both by torch.compile; seconds only, for of compiled code nothing is counted
checkpointed   both computed once more in the backward pass, which counts as backward
best           each by its strategy with the cheapest whole step in that measure

Forward is an inference pass: of the chain step by step (reference), or of the runtime's op (runtime), against the
original MLP's. Where a strategy's own forward pass takes more than inference, as look-ahead's Gram blocks do, the ratio
does not show it; `strategies.compare` compares whole steps.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from ..common.timing import median_seconds
from .strategies.compare import Objective, best
from .strategies.compiled import compiled
from .strategies.slot import Row, Variant, rows

MODES = {"eager": "plain", "compiled": "compiled", "checkpointed": "checkpoint", "best": None}
MEASURES = ("flops", "launches", "dependent", "seconds")


@dataclass(frozen=True, slots=True)
class Asymmetry:
    """value: the ratio of ratios. forward: of the locked slot, reference or runtime. locked, original: the strategies
    whose backward passes these are."""

    mode: str
    measure: str
    forward: str
    value: float
    locked: str
    original: str


def asymmetries(locked: Variant, original: Variant, *, repeats: int = 0) -> list[Asymmetry]:
    """Every mode, measure and forward; seconds only where repeats > 0, on tensors with data.

    Where torch.compile fails, there is no compiled mode.
    """
    ours, theirs = (_trained(variant, repeats) for variant in (locked, original))
    table = []
    for mode in MODES:
        for measure in MEASURES:
            a, b = _chosen(ours, mode, measure), _chosen(theirs, mode, measure)
            if a is None or b is None:
                continue
            base = _backward(b, measure) / _inference(original, "reference", mode, measure, repeats)
            for forward in locked.inference:
                ratio = _backward(a, measure) / _inference(locked, forward, mode, measure, repeats)
                table.append(Asymmetry(mode, measure, forward, ratio / base, a.strategy, b.strategy))
    return table


def _trained(variant: Variant, repeats: int) -> list[Row]:
    """The rows of all strategies that train the weights; the compiled ones only where there is time to measure."""
    chosen = [p for p in variant.strategies if p.trainable == "weights" and (repeats or not p.compiled)]
    return rows(variant, chosen, repeats=repeats)


def _chosen(rows: Iterable[Row], mode: str, measure: str) -> Row | None:
    """The mode's row, None where it lacks the measure."""
    named = MODES[mode]
    return best((row for row in rows if named in (None, row.strategy)), Objective(measure))


def _backward(row: Row, measure: str) -> float:
    if measure == "seconds":
        assert row.seconds is not None
        return row.seconds.backward
    assert row.counts is not None
    return getattr(row.counts.backward, measure)


def _inference(variant: Variant, forward: str, mode: str, measure: str, repeats: int) -> float:
    if measure != "seconds":
        return getattr(variant.count_inference(forward), measure)
    run = variant.inference[forward]
    if mode == "compiled" and forward == "reference":
        run = compiled(run)
    return median_seconds(partial(run, variant.x), variant.x.device, repeats)
