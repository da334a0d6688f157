"""What tests of the audit attack: tiny models, and the context that attacks work in."""

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from dlr_lock.audit.config import AuditConfig
from dlr_lock.audit.context import AuditContext
from dlr_lock.audit.texts import Text
from dlr_lock.convert.mlp_matching import MLP
from dlr_lock.runtime import DLRNet, DLRSpec

# The choices of an audit of a tiny model that takes seconds.
SMALL = {
    "tokens": 1024, "heldout": 256, "tuning": 256, "batch": 64, "sequence": 32, "seeds": 2, "rates": 2,
    "shares": "0.5", "device": "cpu",
}  # fmt: skip
MLPS = ["model.layers.0.mlp", "model.layers.1.mlp"]  # of a tiny Llama


def locked_llama(lanes: int = 1) -> PreTrainedModel:
    """A tiny Llama with chains of five steps of random weights."""
    model = tiny_model("llama")
    for name in MLPS:
        net = DLRNet(DLRSpec(64, lanes, 5, 16))
        net.assign({n: torch.randn_like(p) / 8 for n, p in net.named_parameters()})
        model.set_submodule(name, net)
    return model


def context(
    original: Any, locked: Any, mlps: list[MLP], heldout: Tensor, train: Tensor | None = None, **more: Any
) -> AuditContext:
    """On a CPU, with the neutral text for the task as well; more: fields of the context, and seed."""
    text = Text(heldout if train is None else train, heldout, "tokens")
    config = AuditConfig(device="cpu", max_memory=2**30, seed=more.pop("seed", 0)).resolved()
    given = {"scratch": Path("unused")} | more
    return AuditContext(locked, original, mlps, [mlp.module for mlp in mlps], text, text, config, **given)
