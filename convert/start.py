"""The weights that a distillation starts from, in units where x has unit RMS."""

import math

import torch
from torch import Tensor

from ..runtime import DLRNet, DLRSpec
from .mlps import TeacherWeights

_B = 0.1  # B starts at a tenth of what would double x
_NOTHING = 1e-6  # of the longest sum: what is shorter reads nothing, as do pruned units


def random_start(spec: DLRSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """A, G ~ N(0, 1/d), so that pre-activations have unit RMS; B ~ 0.1 N(0, 1/(K r))."""
    weights = {
        name: torch.randn(spec.weight_shape, generator=generator) / math.sqrt(spec.hidden_size)
        for name in DLRNet.weight_names(spec)
    }
    weights["dlr_B"] = torch.randn(spec.weight_shape, generator=generator) * (
        _B / math.sqrt(spec.depth * spec.rank)
    )
    return weights


def mixed_start(
    spec: DLRSpec, generator: torch.Generator, teacher: TeacherWeights | None
) -> dict[str, Tensor]:
    """A random start whose A and G read sums and differences of what the teacher reads, of norm 1, in random order.

    Of a gated MLP those of a unit's gate g and up u, for g u = ((g + u)^2 - (g - u)^2) / 4, and silu(z) is
    z / 2 + z^2 / 4 around 0. Of an MLP without a gate those of two units drawn at random. B starts at random, so the
    steps are as strongly coupled as ever (docs/recipe.md: the flatten gap, the attacks, and what the rows give away).
    A chain with more rows than there are such sums keeps random ones; without the teacher's weights all are.
    """
    weights = random_start(spec, generator)
    if teacher is None:
        return weights
    sums = _sums(teacher, generator)
    for name in weights:
        if name != "dlr_B":
            rows = weights[name].view(-1, spec.hidden_size)
            order = torch.randperm(len(rows), generator=generator)[: len(sums)]
            signs = torch.randint(2, (len(order), 1), generator=generator) * 2 - 1
            rows[order] = sums[: len(order)] * signs
    return weights


def _sums(teacher: TeacherWeights, generator: torch.Generator) -> Tensor:
    """[n, d] of norm 1: pair by pair, in random order, the sum and the difference; of pruned units neither."""
    up = teacher.up.cpu()
    if teacher.gate is None:
        other = up.roll(int(torch.randint(1, max(2, len(up)), (), generator=generator)), 0)
    else:
        other = teacher.gate.cpu()
    pairs = torch.stack([other + up, other - up], dim=1)
    sums = pairs[torch.randperm(len(pairs), generator=generator)].flatten(0, 1)
    sums = sums / sums.abs().max().clamp(min=1e-30)  # for the squares of large ones
    sizes = sums.norm(dim=1, keepdim=True)
    alive = (sizes > _NOTHING * sizes.max())[:, 0]
    return sums[alive] / sizes[alive]
