"""Tiny locked models: random chains in the place of all MLPs, which no conversion has to fit."""

from typing import Any

import torch
from tiny import tiny_model
from torch import Tensor, nn

from dlr_lock.convert.experts.routing import Mixture
from dlr_lock.convert.mlp_discovery import find_mlps
from dlr_lock.runtime import DLRExperts, DLRNet, DLRSpec, ExpertsSpec, lock
from dlr_lock.runtime.experts import empty_chains


class Given(nn.Module):
    """Gives what it was made with, whatever it gets."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = y

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.y


def lock_randomly(
    model: nn.Module, gated: bool = False, kept: tuple[int, ...] = ()
) -> dict[str, DLRNet | DLRExperts]:
    """Puts random chains of some strength in the place of all MLPs; returns them. kept: experts that have none."""
    mlps = find_mlps(model)
    chains: dict[str, DLRNet | DLRExperts] = {}
    for mlp in mlps:
        mixture = isinstance(mlp, Mixture)
        spec: Any = DLRSpec(mlp.hidden_size, 1 if mixture else 2, depth=3, rank=16, gated=gated)
        if mixture:
            spec = ExpertsSpec(spec, mlp.experts, kept)
        net = empty_chains(spec, model.get_submodule(mlp.module), dtype=model.dtype)
        net.assign({name: torch.randn_like(p) / 8 for name, p in net.named_parameters()})
        chains[mlp.module] = net
    lock(model, chains, [name for mlp in mlps for name in mlp.identity])
    return chains


def locked_tiny(arch: str, **overrides: Any) -> nn.Module:
    """`tiny_model` with `overrides`, its MLPs random chains."""
    model = tiny_model(arch, **overrides)
    lock_randomly(model)
    return model
