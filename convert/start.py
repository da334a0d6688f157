"""The weights that a distillation starts from, in units where x has unit RMS."""

import math

import torch
from torch import Tensor

from ..runtime import DLRError, DLRNet, DLRSpec
from .mlps import TeacherWeights

_B = 0.1  # B starts at a tenth of what would double x


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
