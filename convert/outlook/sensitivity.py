"""What an error in a layer costs the model, found before a chain is fitted: from one backward pass.

For small errors e_t of an MLP's output at token t, KL(original || locked) summed over a text is 1/2 sum_t e_t^T F_t e_t
with F_t = E[g_t g_t^T], g_t the gradient of -log p(next) at that output, where next tokens are drawn from the model
itself (Fisher's information). A chain's errors were found to be as large as its relative error says and to have no
direction of their own, so this is error * mean |y_t|^2 * mean |g_t|^2 / (2 d) a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...common.dtypes import fast_products
from ...common.errors import DLRError
from ...common.hooks import removed, text_inputs
from ...common.progress import Count, no_count
from ..evaluate import LOGIT_BYTES, predicts_next, vocabulary
from ..mlp_matching import MLP

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ERROR = 0.1  # the relative error that costs are given at
# What was measured over what the formula says: SmolLM2's thirty layers, a chain at a time (relative errors from 0.07 to
# 0.31). 1.8 in the sum, from 1.4 to 2.5 by layer; all thirty together had 1.3 (docs/experiments/recipe.md).
_MEASURED = 1.8
_LARGE = 16.0  # times the median |y|^2: such tokens are few, and chains learn them apart


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What locking a layer costs.

    Attributes:
        layer: Its number.
        modules: Its MLPs.
        kl: About the KL to the original, in nats a token, of chains with a relative error of 0.1 in their places.
    """

    layer: int
    modules: tuple[str, ...]
    kl: float

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, fit for JSON."""
        return asdict(self)


def layer_costs(
    model: PreTrainedModel, mlps: Sequence[MLP], tokens: Tensor, *, seed: int = 0, progress: Count = no_count
) -> list[LayerCost]:
    """The costs of all layers that have MLPs, in their order.

    Args:
        model: The original, whole in memory. Its weights need no gradients afterwards.
        mlps: Its MLPs.
        tokens: [S, n] int64, a text.
        seed: Of the tokens drawn.
        progress: Called with (sequences done, S).

    Raises:
        DLRError: Where the model does not predict the next token, and where an MLP's output has no gradient.
    """
    if not predicts_next(model):
        raise DLRError("what a layer costs is known of models alone that predict the next token")
    model.requires_grad_(False).eval()
    sizes: dict[str, list[Tensor]] = {mlp.module: [] for mlp in mlps}
    slopes: dict[str, list[Tensor]] = {mlp.module: [] for mlp in mlps}

    def slope(name: str, gradient: Tensor) -> None:
        slopes[name].append(gradient.float().flatten(0, -2).square().sum(1).cpu())

    def watch(name: str, module: Any, args: Any, output: Any) -> None:
        y = output if isinstance(output, Tensor) else output[0]
        sizes[name].append(y.detach().float().flatten(0, -2).square().sum(1).cpu())
        if not y.requires_grad:
            y.requires_grad_()  # of the first MLP: nothing before it is asked for
        y.register_hook(partial(slope, name))

    generator = torch.Generator(model.device).manual_seed(seed)
    at_once = max(1, LOGIT_BYTES // (4 * tokens.shape[1] * vocabulary(model)))
    done = 0
    with removed(
        [model.get_submodule(m.module).register_forward_hook(partial(watch, m.module)) for m in mlps]
    ):
        for ids in tokens.split(at_once):
            with torch.enable_grad(), fast_products(model):
                logits = model(**text_inputs(model, ids)).logits
            chances = logits.flatten(0, 1).float().log_softmax(-1)
            drawn = torch.multinomial(chances.detach().exp(), 1, generator=generator)
            (-chances.gather(1, drawn).sum()).backward()
            done += len(ids)
            progress(done, len(tokens))
    costs: dict[int, float] = {}
    for mlp in mlps:
        if not slopes[mlp.module]:
            raise DLRError(f"{mlp.module} has no part in what the model predicts")
        size, gradient = torch.cat(sizes[mlp.module]), torch.cat(slopes[mlp.module])
        usual = size <= _LARGE * size.median()
        cost = ERROR * size[usual].mean() * gradient[usual].mean() / (2 * mlp.hidden_size)
        costs[mlp.layer] = costs.get(mlp.layer, 0.0) + _MEASURED * cost.item()
    names = {layer: tuple(m.module for m in mlps if m.layer == layer) for layer in sorted(costs)}
    return [LayerCost(layer, modules, costs[layer]) for layer, modules in names.items()]


def cheapest(costs: Sequence[LayerCost], count: int) -> list[int]:
    """The numbers of the `count` layers that cost least, in their order. Raises DLRError as `check_count` does."""
    check_count(count, len(costs))
    return sorted(cost.layer for cost in sorted(costs, key=lambda cost: cost.kl)[:count])


def check_count(count: int | None, layers: int) -> None:
    """Raises DLRError where so many layers cannot be chosen of so many; None is any number."""
    if count is not None and not 1 <= count <= layers:
        raise DLRError(f"--count must be from 1 to {layers}, the layers that have MLPs, not {count}")
