"""What one training step costs: seconds, and the activations that autograd keeps for the backward pass."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..triton_kernels import backend


@dataclass(frozen=True, slots=True)
class StepCost:
    """One model on one batch. forward: seconds of an inference pass; step: seconds of forward, backward and
    the update of every parameter; saved: bytes of activations held between forward and backward."""

    tokens: int
    forward: float
    step: float
    saved: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def step_cost(model: PreTrainedModel, tokens: Tensor, *, repeats: int = 3) -> StepCost:
    """Full fine-tuning of every parameter on tokens [S, n] int64, in plain autograd without recomputation, against
    an inference pass by the current backend.

    Times are medians of `repeats` after one warm-up. The update is SGD with a rate of 0: the model is unchanged,
    its gradients are freed, and its trainable parameters are what they were.
    """
    tokens = tokens.to(model.device)
    with torch.no_grad():
        forward = _median_seconds(lambda: model(input_ids=tokens, use_cache=False), repeats, model.device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def loss() -> Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    try:
        saved = saved_bytes(model, loss)
        with backend("naive"):  # the fused forward has no backward
            seconds = _median_seconds(step, repeats, model.device)
    finally:
        optimizer.zero_grad()
        model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)
    return StepCost(tokens.numel(), forward, seconds, saved)


def saved_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd saves during `forward()`, parameters and buffers of `module` left out.

    DLR-Nets run as the plain chain, since nothing else has a backward. Counted by
    torch.autograd.graph.saved_tensors_hooks; a storage that several nodes share counts once.
    """
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor  # held by the graph, so that no address is used twice while we count

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), backend("naive"):
        result = forward()
    total = sum(storages.values())
    del result
    return total


def _median_seconds(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
