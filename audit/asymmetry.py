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

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..common.timing import median_seconds
from ..runtime import DLRSpec
from .strategies.compare import Objective, best_cost
from .strategies.compiled import compiled
from .strategies.slot import SlotVariant, StrategyCost, slot_cost, slot_costs, slot_variants

MODES = {"eager": "plain", "compiled": "compiled", "checkpointed": "checkpoint", "best": None}
MEASURES = ("flops", "launches", "dependent", "seconds")
DEPTHS = (8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Asymmetry:
    """One ratio of ratios.

    Attributes:
        mode: One of MODES.
        measure: One of MEASURES.
        forward: What runs the locked slot's forward pass, 'reference' or 'runtime'.
        value: (backward / forward) of the locked slot over that of the original.
        locked, original: The strategies whose backward passes these are.
    """

    mode: str
    measure: str
    forward: str
    value: float
    locked: str
    original: str


@dataclass(frozen=True, slots=True)
class DepthCost:
    """What plain autograd takes in a slot with a chain, and with the SwiGLU MLP of as many parameters.

    Attributes:
        chain: The chain's form, in words.
        depth: Its steps.
        saved, original_saved: Bytes that autograd saves for the backward pass.
        backward, original_backward: By each of 'flops', 'launches' and 'dependent', the backward pass over the
            inference pass, which is the runtime's for the chain.
    """

    chain: str
    depth: int
    saved: int
    original_saved: int
    backward: dict[str, float]
    original_backward: dict[str, float]


def depth_costs(spec: DLRSpec, intermediate: int, *, tokens: int) -> Iterator[DepthCost]:
    """The paper's two claims, of activations kept and of backward passes, for the tools that everyone has.

    Counted in float32 on tensors without data.

    Args:
        spec: Of a chain; the others have its width and activation, one lane, and another depth: the nearest to each of
            DEPTHS that keeps the MLP's parameters.
        intermediate: Width of the SwiGLU MLP.
        tokens: Of the step.

    Yields:
        A row for each depth, in ascending order.
    """
    chains = {
        DLRSpec.matching(spec.hidden_size, intermediate, mlp_gated=True, depth=depth, act=spec.act)
        for depth in DEPTHS
    }
    for chain in sorted(chains, key=lambda c: c.depth):
        with FakeTensorMode():
            sides = slot_variants(
                chain, intermediate, tokens=tokens, dtype=torch.float32, device=torch.device("cpu")
            )
            (saved, backward), (original_saved, original_backward) = map(_plain, sides)
        yield DepthCost(str(chain), chain.depth, saved, original_saved, backward, original_backward)


def _plain(variant: SlotVariant) -> tuple[int, dict[str, float]]:
    """Of the plain strategy: bytes saved, and backward over forward."""
    row = slot_cost(variant, variant.strategy("plain"))
    forward = "runtime" if "runtime" in variant.inference else "reference"
    over = {
        measure: _backward(row, measure) / _inference(variant, forward, "eager", measure, 0)
        for measure in MEASURES
        if measure != "seconds"
    }
    return row.saved or 0, over


def asymmetries(locked: SlotVariant, original: SlotVariant, *, repeats: int = 0) -> list[Asymmetry]:
    """The ratios of a slot in every mode and measure, by every forward pass.

    Args:
        locked, original: The slot with the chain, and with the MLP.
        repeats: How often a pass is timed, on tensors with data; where this is 0 there are no seconds.

    Returns:
        The ratios; none of the compiled mode where torch.compile fails.
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


def _trained(variant: SlotVariant, repeats: int) -> list[StrategyCost]:
    """The costs of all strategies that train the weights; the compiled ones only where there is time to measure."""
    chosen = [p for p in variant.strategies if p.trainable == "weights" and (repeats or not p.compiled)]
    return slot_costs(variant, chosen, repeats=repeats)


def _chosen(costs: Iterable[StrategyCost], mode: str, measure: str) -> StrategyCost | None:
    """The mode's row, None where it lacks the measure."""
    named = MODES[mode]
    return best_cost((cost for cost in costs if named in (None, cost.strategy)), Objective(measure))


def _backward(row: StrategyCost, measure: str) -> float:
    if measure == "seconds":
        assert row.seconds is not None
        return row.seconds.backward
    assert row.counts is not None
    return getattr(row.counts.backward, measure)


def _inference(variant: SlotVariant, forward: str, mode: str, measure: str, repeats: int) -> float:
    if measure != "seconds":
        return getattr(variant.count_inference(forward), measure)
    run = variant.inference[forward]
    if mode == "compiled" and forward == "reference":
        run = compiled(run)
    return median_seconds(partial(run, variant.x), variant.x.device, repeats)
