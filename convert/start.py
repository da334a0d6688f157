"""The weights that a distillation starts from, in units where x has unit RMS."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..runtime import DLRError, DLRNet, DLRSpec
from .mlps import MLP, TeacherWeights, teacher_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_B = 0.1  # B starts at a tenth of what would double x
# Of the teacher's rows in a row of the mixed start. Few: sums of all rows gain 1% over a random start, these 6%
# (layer 12, 204,800 visits). Odd: no row can cancel itself.
_SUMMED = 3


def starting_weights(start: str, model: "PreTrainedModel", mlp: MLP) -> TeacherWeights | None:
    """What a start takes from the MLP; None for a random one and for a mixed one where the MLP's inside is unknown.

    Raises DLRError for an aligned one there.
    """
    if start == "random" or (start == "mixed" and mlp.up is None):
        return None
    return teacher_weights(model, mlp)


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
    """A random start whose A and G read signed sums of a few of the teacher's rows, drawn at random, of norm 1.

    The rows are those of gate and up together, which read what matters of x; no sum reads what one hidden unit reads,
    so the teacher is no nearer to the chain than a random start leaves it (docs/recipe.md has the copy's errors).
    Without the teacher's weights it is the random start.
    """
    weights = random_start(spec, generator)
    if teacher is None:
        return weights
    rows = torch.cat([part for part in (teacher.gate, teacher.up) if part is not None]).cpu().float()
    for name in weights.keys() - {"dlr_B"}:
        count = weights[name].numel() // spec.hidden_size
        drawn = torch.randint(len(rows), (_SUMMED, count), generator=generator)
        signs = torch.randint(2, (_SUMMED, count, 1), generator=generator) * 2 - 1
        sums = (rows[drawn] * signs).sum(0)
        weights[name] = torch.nn.functional.normalize(sums, dim=1).view(spec.weight_shape)
    return weights


def aligned_start(
    spec: DLRSpec, generator: torch.Generator, rms_x: float, teacher: TeacherWeights | None
) -> dict[str, Tensor]:
    """A random start whose A and G read what the teacher's hidden units read.

    Rows run over the steps in the MLP's order; a chain with more rows than the MLP keeps random ones.
    """
    if teacher is None:
        raise DLRError("the aligned start needs the teacher's weights")
    weights = random_start(spec, generator)
    if spec.gated:
        reads = {"dlr_A": teacher.up, "dlr_G": teacher.gate}
    else:
        reads = {"dlr_A": teacher.up if teacher.gate is None else torch.cat([teacher.gate, teacher.up])}
    for name, rows in reads.items():
        if rows is None:
            raise DLRError("an aligned start with gated steps needs a gated MLP")
        flat = weights[name].view(-1, spec.hidden_size)
        count = min(len(rows), len(flat))
        flat[:count] = rows[:count].cpu().float() * rms_x
    return weights
