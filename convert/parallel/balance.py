"""Independent modules dealt out to processes, by what their fits compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...runtime import DLRNet, DLRSpec
from ...triton_kernels import ChainWeights, chain_reference
from ..config import ConversionConfig, Recipe
from ..distill import muon_groups
from ..evaluate import relative_error
from ..experts.routing import Mixture
from ..mlp_matching import MLP
from ..muon import Muon


def dealt(flops: Sequence[float], size: int) -> list[list[int]]:
    """Jobs to processes: the dearest first, each to whoever has least to do.

    Args:
        flops: Of each job.
        size: How many processes there are.

    Returns:
        For each process the numbers of its jobs, ascending.
    """
    jobs: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for job in sorted(range(len(flops)), key=lambda number: -flops[number]):
        least = min(range(size), key=lambda rank: loads[rank])
        jobs[least].append(job)
        loads[least] += flops[job]
    return [sorted(own) for own in jobs]


def fit_flops(mlps: Sequence[MLP], config: ConversionConfig, text: Any) -> list[float]:
    """FLOPs of fitting each MLP's chain; the attack on it takes its share of as many.

    Args:
        mlps: The MLPs, mixtures among them.
        config: Resolved.
        text: The model's config of its text part, which says how many experts a token has.
    """
    steps: dict[DLRSpec, int] = {}
    found = []
    for mlp in mlps:
        recipe = config.recipe(gated=mlp.gated)
        trained, params = float(recipe.train_tokens), mlp.params
        if isinstance(mlp, Mixture):
            params = mlp.expert_params
            share = getattr(text, "num_experts_per_tok", None) or 1
            trained = max(mlp.experts * recipe.batch, trained * share)
        spec = config.spec_for(mlp.hidden_size, params)
        if spec not in steps:
            steps[spec] = step_flops(spec, recipe)
        found.append(trained / recipe.batch * steps[spec])
    return found


def step_flops(spec: DLRSpec, recipe: Recipe) -> int:
    """FLOPs of one step of a fit, gradients and optimizer, counted by torch's counter on the meta device."""
    d = spec.hidden_size
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        weights = {name: torch.empty(spec.weight_shape) for name in DLRNet.weight_names(spec)}
        optimizer = Muon(muon_groups(weights, recipe, torch.empty(d, d)), momentum=recipe.momentum)
        trial_gradients(weights, torch.empty(recipe.batch, d), spec.act)
        optimizer.step()
    return counter.get_total_flops()


def trial_gradients(weights: dict[str, Tensor], x: Tensor, act: str) -> None:
    """Sets every weight's gradient of a batch x [T, d], as a step of a fit does, to see what it takes."""
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    one, zero = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
    chain = ChainWeights(leaves["dlr_A"], leaves["dlr_B"], one, zero, leaves.get("dlr_G"), act)
    relative_error(chain_reference(x, chain), x).sum().backward()
    for name, weight in weights.items():
        weight.grad = leaves[name].grad
