"""The end-to-end phase: all chains at once, against what the original says at the end of the model.

Modules fitted one at a time leave errors that only the whole model shows. Here the loss is taken where the
model's users look: KL(original || locked) of the next token, or, in a model without a language-model head,
|locked - original|^2 / |original|^2 of the last hidden states. Only the chains learn.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..runtime import DLRError, DLRNet
from ..runtime.quantizer import replace_module
from ..triton_kernels import chain_reference, flattened_reference
from .evaluate import CHUNK, LOGIT_BYTES, divergence, predicts_next, run_body, vocabulary
from .fidelity import in_float32, relative_error
from .muon import Muon

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """`visits` token visits in batches of about `batch` tokens (whole sequences), Muon at peak rate `rate`."""

    visits: int
    batch: int = 2048
    rate: float = 0.0005
    momentum: float = 0.9
    seed: int = 0


class Trainable(nn.Module):
    """A chain as its owner, or an attacker, trains it: the reference with float32 parameters, recomputed in
    backward so that one chain's steps at a time are held."""

    dlr_A: nn.Parameter
    dlr_B: nn.Parameter
    dlr_G: nn.Parameter | None
    dlr_scale: nn.Parameter
    dlr_bias: nn.Parameter

    def __init__(self, net: DLRNet, device: torch.device) -> None:
        super().__init__()
        self.register_parameter("dlr_G", None)
        self.act = net.spec.act
        for name, weight in net.named_parameters():
            trains = name in net.weight_names(net.spec)
            value = weight.detach().to(device, torch.float32, copy=True)
            self.register_parameter(name, nn.Parameter(value, requires_grad=trains))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._chain(x)
        return checkpoint(self._chain, x, use_reentrant=False)

    def _chain(self, x: Tensor) -> Tensor:
        vectors = self.dlr_scale, self.dlr_bias
        y = chain_reference(x.float(), self.dlr_A, self.dlr_B, *vectors, self.dlr_G, self.act)
        return y.to(x.dtype)


def train_together(
    model: PreTrainedModel,
    chains: dict[str, DLRNet],
    identity: list[str],
    tokens: Tensor,
    plan: EndToEnd,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    watch: Callable[[int, float], None] | None = None,
) -> dict[str, DLRNet]:
    """Trains all `chains`, in their places in `model` (the original, left as it is), on tokens [S, n].

    Returns new chains in the dtype of the old. identity: modules that a chain replaces besides its own. watch is
    called after every batch with (visits, its loss). Raises DLRError where the loss is not finite.
    """
    places = {name: Trainable(net, model.device) for name, net in chains.items()}
    student = with_chains(model, places, identity)
    optimizer = Muon(
        [
            {"params": [p for p in place.parameters() if p.requires_grad], "lr": plan.rate}
            for place in places.values()
        ],
        momentum=plan.momentum,
    )
    generator = torch.Generator().manual_seed(plan.seed)
    sequences, n = tokens.shape
    at_once = max(1, min(plan.batch // n, LOGIT_BYTES // (4 * n * vocabulary(model)), sequences))
    parts = max(1, round(plan.batch / (n * at_once)))
    order = torch.empty(0, dtype=torch.int64)
    steps = max(1, math.ceil(plan.visits / (n * at_once * parts)))
    for step in range(steps):
        done = (step + 0.5) / steps
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * min(1.0, (step + 1) / max(1, steps // 10), 2 * (1 - done))
        total = 0.0
        for _ in range(parts):
            if len(order) < at_once:
                order = torch.randperm(sequences, generator=generator)
            ids, order = tokens[order[:at_once]].to(model.device), order[at_once:]
            loss = distance(student, model, ids) / parts
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise DLRError("the end-to-end phase diverged: try a lower rate")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        visits = (step + 1) * parts * at_once * n
        progress(min(visits, plan.visits), plan.visits)
        if watch is not None:
            watch(visits, total)
    return {name: _stored(places[name], net) for name, net in chains.items()}


def distance(student: nn.Module, original: PreTrainedModel, ids: Tensor) -> Tensor:
    """How far the student is from the original on ids [b, n]: mean KL of the next token's distribution, or the
    mean relative error of the last hidden states; a scalar tensor that carries the student's gradients."""
    with torch.no_grad():
        wanted = _output(original, ids)
    got = _output(student, ids)
    if not predicts_next(original):
        return relative_error(got, wanted).mean()
    # One part after the other through the softmax, computed again in backward: at 49,152 tokens of vocabulary
    # the log-probabilities of 1024 positions are 200 MB.
    parts = max(1, got.numel() // CHUNK)
    losses = [
        checkpoint(_kl, g, w, use_reentrant=False)
        for g, w in zip(got.chunk(parts), wanted.chunk(parts), strict=True)
    ]
    return torch.stack(losses).sum() / len(got)


def _kl(got: Tensor, wanted: Tensor) -> Tensor:
    """Summed over positions; logits [T, V]."""
    return divergence(wanted.log_softmax(-1), got.log_softmax(-1)).sum()


def _output(model: Any, ids: Tensor) -> Tensor:
    """Logits [T, V], or last hidden states [T, d], in float32."""
    states = model(input_ids=ids).logits if predicts_next(model) else run_body(model, ids)[0]
    return states.float().flatten(0, 1)


def with_chains(model: PreTrainedModel, chains: dict[str, Any], identity: list[str]) -> PreTrainedModel:
    """A copy of the model with `chains`, modules by name, in their places; all other weights are the model's own
    tensors, not copies."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    student = copy.deepcopy(model, memo=shared)
    for name, chain in chains.items():
        # on the model's device; a chain that is there already stays the very module, for it is being trained
        here = (
            chain
            if next(chain.parameters()).device == model.device
            else copy.deepcopy(chain).to(model.device)
        )
        replace_module(student, name, here)
    for name in identity:
        replace_module(student, name, nn.Identity())
    return student


@torch.no_grad()
def flatten_gaps(model: PreTrainedModel, chains: dict[str, DLRNet], tokens: Tensor) -> dict[str, float]:
    """Of each chain in a locked model: mean of |flattened - chain|^2 / |chain|^2 over its inputs for tokens [S, n]."""
    seen: dict[str, list[Tensor]] = {name: [] for name in chains}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].float().flatten(0, -2)
            weights = in_float32(chains[name], x.device)
            seen[name].append(relative_error(flattened_reference(x, *weights), chain_reference(x, *weights)))

        return keep

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in chains]
    try:
        for ids in tokens.split(8):
            run_body(model, ids)
    finally:
        for handle in hooks:
            handle.remove()
    return {name: torch.cat(parts).mean().item() for name, parts in seen.items()}


def _stored(place: Trainable, net: DLRNet) -> DLRNet:
    trained = DLRNet(net.spec, dtype=net.dlr_A.dtype)
    trained.assign({name: weight.detach().cpu() for name, weight in place.named_parameters()})
    return trained
