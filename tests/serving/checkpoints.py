"""Tiny locked checkpoints of many architectures, and a real one, for a server; and what transformers generates."""

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from dlr_lock import convert_model
from dlr_lock.audit.demo import fetch_model
from dlr_lock.common.cache import cache_folder
from dlr_lock.convert.data import english_topics
from dlr_lock.convert.experts.routing import Mixture
from dlr_lock.convert.mlp_discovery import find_mlps
from dlr_lock.runtime import DLRSpec, ExpertsSpec, lock
from dlr_lock.runtime.checkpoint import write_manifest
from dlr_lock.runtime.experts import empty_chains

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def lock_randomly(model: nn.Module, kept: tuple[int, ...] = ()) -> None:
    """Puts random chains, strong enough to be seen in the logits, in the place of all MLPs; kept: experts without."""
    generator = torch.Generator().manual_seed(1)
    mlps = find_mlps(model)
    chains = {}
    for mlp in mlps:
        spec: Any = DLRSpec(mlp.hidden_size, lanes=1, depth=3, rank=16)
        if isinstance(mlp, Mixture):
            spec = ExpertsSpec(spec, mlp.experts, kept)
        net = empty_chains(spec, model.get_submodule(mlp.module) if kept else None, dtype=model.dtype)
        net.assign({n: torch.randn(p.shape, generator=generator) / 8 for n, p in net.named_parameters()})
        chains[mlp.module] = net
    lock(model, chains, [name for mlp in mlps for name in mlp.identity])


def save_locked(arch: str, folder: Path, *, kept: tuple[int, ...] = (), **config: Any) -> Path:
    """A tiny locked model of `arch` with a tokenizer, a chat template and a manifest; returns `folder`."""
    model = tiny_model(arch, **config)
    lock_randomly(model, kept)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    write_manifest(folder, {})
    return folder


def lock_smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct with three of thirty layers locked by a short conversion; returns its folder."""
    text, locked = folder / "text.txt", folder / "locked"
    text.write_text(english_topics(), encoding="utf-8")
    convert_model(
        fetch_model(cache_folder()), locked, data=str(text), layers="13-15", tokens=16_384, heldout=2_048,
        train_tokens=16_384, device="cpu",
    )  # fmt: skip
    return locked


@torch.no_grad()
def greedy(folder: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    """What transformers itself generates, in float32, prompt by prompt and whatever token ends a text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        output = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        found.append(output[0, len(prompt) :].tolist())
    return found
