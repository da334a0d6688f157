"""One step of a fit, counted: the conversion's own code runs on the meta device under a meter.

What is dear and of our own making is not reckoned by a formula.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ...runtime import DLRNet, DLRSpec
from ...triton_kernels import ChainWeights, chain_reference
from ...triton_kernels.meter import Meter
from ..config import Recipe
from ..distill import muon_groups
from ..evaluate import relative_error
from ..muon import Muon


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a fit.

    Attributes:
        flops: Of both passes and of the optimizer.
        held: Bytes alive at the peak: weights, gradients, momentum, the last good state and what is between them.
    """

    flops: int
    held: int


@cache
def step_of(spec: DLRSpec, recipe: Recipe, parts: int) -> Step:
    """Counts one step of `distill`, by running its code on the meta device.

    Args:
        spec: The chain.
        recipe: Its batch, and whether the reading directions have a preconditioner, are what counts.
        parts: How many parts a batch is worked on in at the same time, each with gradients of its own.
    """
    d = spec.hidden_size
    tokens = recipe.batch + int(recipe.batch * 4 / 512)
    meter = Meter()
    with torch.device("meta"):
        weights = {name: torch.empty(spec.weight_shape) for name in DLRNet.weight_names(spec)}
        x = torch.empty(max(1, tokens // parts), d)
        optimizer = Muon(muon_groups(weights, recipe, torch.empty(d, d)), momentum=recipe.momentum)
        with meter:
            gradients = _gradients(weights, x, spec.act)
        passes, of_passes = meter.take().flops, meter.peak
        own = sum(g.nbytes for g in gradients)
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight.grad = gradient
        with meter:
            optimizer.step()
        steps, of_step = meter.take().flops, meter.peak
        with meter:
            optimizer.step()  # with a momentum that is there already
        of_step = max(of_step, meter.peak)
    size = sum(w.nbytes for w in weights.values())
    # Weights, the last good state, momentum (of which the meter sees the first step's), and the parts' gradients.
    held = 2 * size + max(parts * of_passes + size + (parts > 1) * own, of_step + (parts - 1) * own)
    return Step(passes * parts + steps, held)


def _gradients(weights: dict[str, Tensor], x: Tensor, act: str) -> list[Tensor]:
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    one, zero = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
    chain = ChainWeights(leaves["dlr_A"], leaves["dlr_B"], one, zero, leaves.get("dlr_G"), act)
    relative_error(chain_reference(x, chain), x).sum().backward()
    return [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
