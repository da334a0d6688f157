"""Tiny locked models: random chains in the place of all MLPs, which no conversion has to fit."""

from typing import Any

import torch
from tiny import tiny_model
from torch import nn

from dlr_lock.convert.mlp_discovery import find_mlps
from dlr_lock.runtime import DLRNet, DLRSpec, lock


def lock_randomly(model: nn.Module, gated: bool = False) -> dict[str, DLRNet]:
    """Puts random chains of some strength in the place of all MLPs; returns them."""
    mlps = find_mlps(model)
    chains = {}
    for mlp in mlps:
        spec = DLRSpec(hidden_size=mlp.hidden_size, lanes=2, depth=3, rank=16, gated=gated)
        net = DLRNet(spec, dtype=model.dtype)
        net.assign({name: torch.randn_like(p) / 8 for name, p in net.named_parameters()})
        chains[mlp.module] = net
    lock(model, chains, [name for mlp in mlps for name in mlp.identity])
    return chains


def locked_tiny(arch: str, **overrides: Any) -> nn.Module:
    """`tiny_model` with `overrides`, its MLPs random chains."""
    model = tiny_model(arch, **overrides)
    lock_randomly(model)
    return model
