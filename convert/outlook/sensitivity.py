"""What locking a layer will cost the model, found before a chain is fitted: from one backward pass.

For small errors e_t of an MLP's output at token t, KL(original || locked) summed over a text is 1/2 sum_t e_t^T F_t e_t
with F_t = E[g_t g_t^T], g_t the gradient of -log p(next) at that output, where next tokens are drawn from the model
itself (Fisher's information). A chain's errors were found to be as large as its relative error says and to have no
direction of their own, so this is error * mean |y_t|^2 * mean |g_t|^2 / (2 d) a token.

How large that relative error will be is told by what the best linear map of the MLP's input leaves of its output: a
chain leaves more of what a linear map leaves much of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...common.dtypes import fast_products
from ...common.errors import DLRError, first_line
from ...common.hooks import first_argument, removed, text_inputs
from ...common.progress import Count, no_count
from ..distill import usual
from ..evaluate import predicts_next, sequences_at_once, size_of, vocabulary
from ..experts.routing import Mixture
from ..mlp_matching import MLP

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A chain's relative error is _LEFT * linear^_POWER after 51,200 training tokens, with `linear` that of the best linear
# map of 4,096 tokens: for SmolLM2's thirty layers (linear from 0.03 to 0.37, chains from 0.06 to 0.31) off by 6% in the
# mean and 13% at most. Another part of the text moves it by 7%.
_LEFT, _POWER = 0.535, 0.63
# What of it is left after other numbers of training tokens, the mean over the thirty layers.
_TRAINED = {51_200: 1.0, 102_400: 0.73, 409_600: 0.47}
# What was measured over what the formula says: SmolLM2's thirty layers, a chain at a time (relative errors from 0.07 to
# 0.31). 1.8 in the sum, from 1.4 to 2.5 by layer; all thirty together had 1.3 (docs/experiments/recipe.md).
_MEASURED = 1.8
# Of such costs, summed, thirty layers had 0.56 together at 102,400 training tokens and 0.57 at 409,600, six (12 to 17,
# in sequence) 0.75 at 409,600, and one has all of its own: count^_TOGETHER.
_TOGETHER = -0.165
OFF = 1.5  # the factor by which a prediction may be off
# The least and the most that the loss rose by over the KL, in ten measurements of SmolLM2 with some or all layers
# locked: 0.28 to 0.84 where the KL was about 0.1, 0.71 to 0.93 where it was 0.6 to 2.1 (docs/experiments/recipe.md).
_GAP = (0.28, 0.93)
_TOKENS, _TIMES_HIDDEN, _LEAST = 4096, 4, 2  # of a text: at least, by hidden size, and fewer are refused
AT_ONCE = 512  # tokens of a pass: backward, the activations of all layers are held


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What locking a layer will cost, as far as can be told before.

    Attributes:
        layer: Its number.
        modules: Its MLPs.
        error: The relative error that their chains will have, the mean.
        kl: The KL to the original that follows, in nats a token, were this layer locked alone.
    """

    layer: int
    modules: tuple[str, ...]
    error: float
    kl: float

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, fit for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Foretold:
    """What locking some layers together will cost the model, without an end-to-end phase.

    Attributes:
        layers: Each of them, were it alone.
        kl: The KL to the original, in nats a token.
        kl_between: From where to where it may be.
        loss_gap_between: The same of what the loss rises by, in nats a token.
    """

    layers: tuple[LayerCost, ...]
    kl: float
    kl_between: tuple[float, float]
    loss_gap_between: tuple[float, float]

    @classmethod
    def of(cls, costs: Sequence[LayerCost]) -> Foretold:
        """Of one layer and more."""
        kl = len(costs) ** _TOGETHER * sum(cost.kl for cost in costs)
        low, high = kl / OFF, kl * OFF
        return cls(tuple(costs), kl, (low, high), (_GAP[0] * low, _GAP[1] * high))

    @property
    def kl_words(self) -> str:
        """The KL with what is uncertain of it."""
        return f"about {self.kl:.2g} ({between(self.kl_between)})"

    @property
    def words(self) -> str:
        """All of it."""
        return f"a KL of {self.kl_words}, a loss higher by {between(self.loss_gap_between)}"

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, fit for JSON."""
        return asdict(self)


def between(ends: tuple[float, float]) -> str:
    """Two ends in words."""
    return f"{ends[0]:.2g} to {ends[1]:.2g}"


def foretelling_tokens(mlps: Sequence[MLP]) -> int:
    """How many tokens of a text foretell well."""
    return max(_TOKENS, _TIMES_HIDDEN * max(mlp.hidden_size for mlp in mlps))


def why_unknown(model: PreTrainedModel, mlps: Sequence[MLP], tokens: int, *, whole: bool) -> str | None:
    """Why the costs of layers cannot be foretold, in a sentence; None where they can.

    Args:
        model: The original, or its class on the meta device.
        mlps: Its MLPs.
        tokens: Of the text that there is.
        whole: Whether the model is whole in memory.
    """
    least = _LEAST * max(mlp.hidden_size for mlp in mlps)
    if not predicts_next(model):
        return "what a layer costs is known of models alone that predict the next token"
    if mixed := [mlp.module for mlp in mlps if isinstance(mlp, Mixture)]:
        return f"what a layer costs is not known of mixtures of experts, as {mixed[0]} is one"
    if not whole:
        return "what a layer costs is told by a backward pass, which wants the whole model in memory"
    if tokens < least:
        return f"--tokens must be at least {least} in whole sequences, twice the hidden size"
    return None


def measured(train_tokens: int) -> bool:
    """Whether fits of so many training tokens are among what errors are foretold from."""
    return min(_TRAINED) <= train_tokens <= max(_TRAINED)


def expected_error(linear: float, train_tokens: int) -> float:
    """The relative error of a chain after so many training tokens, where the best linear map has `linear`."""
    known = sorted(_TRAINED)
    left = np.interp(math.log(train_tokens), np.log(known), np.log([_TRAINED[n] for n in known]))
    return min(1.0, _LEFT * linear**_POWER * math.exp(left))


class _Watched:
    """What one pass over a text says of an MLP."""

    def __init__(self, mlp: MLP) -> None:
        self.mlp = mlp
        self.sizes: list[Tensor] = []  # |y|^2 of every token
        self.slopes: list[Tensor] = []  # |g|^2
        self._x = torch.zeros(0)
        self._gram: Tensor | None = (
            None  # [d + 1, 2 d + 1], of (x, 1) with (x, 1, y), a token in units of |y|
        )

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._x = first_argument(args, kwargs).detach()

    def leave(self, module: Any, args: Any, output: Any) -> None:
        y = output if isinstance(output, Tensor) else output[0]
        wanted = y.detach().float().flatten(0, -2)
        size = size_of(wanted)
        self.sizes.append(wanted.square().sum(1).cpu())
        read = torch.nn.functional.pad(self._x.float().flatten(0, -2), (0, 1), value=1.0)
        of = size.rsqrt()[:, None]
        # Not in the model's products: rounded to bfloat16, what a linear map leaves of SmolLM2's first and last MLP, a
        # fiftieth, moved by a half with the number of sequences in a pass.
        with torch.autocast(wanted.device.type, enabled=False):
            gram = (read * of).T @ (torch.cat([read, wanted], 1) * of)
        self._gram = gram if self._gram is None else self._gram + gram
        if not y.requires_grad:
            y.requires_grad_()  # of the first MLP: nothing before it is asked for
        y.register_hook(self._slope)

    def _slope(self, gradient: Tensor) -> None:
        self.slopes.append(gradient.float().flatten(0, -2).square().sum(1).cpu())

    def linear(self) -> float:
        """The relative error of the best linear map of x to y, without what it owes to having seen these tokens."""
        assert self._gram is not None
        tokens = sum(len(size) for size in self.sizes)
        rows = len(self._gram)
        gram, cross = self._gram.double().cpu().split([rows, rows - 1], dim=1)
        variance = (
            gram.diagonal()
        )  # of each feature's own size: the constant's may be a thousandth of the others'
        ridge = 1e-6 * variance.clamp(min=1e-6 * variance.mean().item()).diag()
        explained = (cross * torch.linalg.solve(gram + ridge, cross)).sum().item()
        return min(1.0, max(0.0, tokens - explained) / max(1, tokens - rows))

    def formula(self, error: float) -> float:
        """The KL of chains with such a relative error, by the formula alone."""
        size, gradient = torch.cat(self.sizes), torch.cat(self.slopes)
        ordinary = usual(size)
        return (error * size[ordinary].mean() * gradient[ordinary].mean() / (2 * self.mlp.hidden_size)).item()


def layer_costs(
    model: PreTrainedModel,
    mlps: Sequence[MLP],
    tokens: Tensor,
    train_tokens: int,
    *,
    seed: int = 0,
    progress: Count = no_count,
) -> list[LayerCost]:
    """The costs of all layers that have MLPs, in their order.

    Args:
        model: The original, whole in memory. Its weights need no gradients afterwards.
        mlps: Its MLPs.
        tokens: [S, n] int64, a text of about `foretelling_tokens`.
        train_tokens: Of each chain, for which costs are asked.
        seed: Of the tokens drawn.
        progress: Called with (sequences done, S).

    Raises:
        DLRError: As `why_unknown` says, and where the pass fails, an MLP's output has no gradient or what is found is
            not finite.
    """
    if why := why_unknown(model, mlps, tokens.numel(), whole=True):
        raise DLRError(why)
    model.requires_grad_(False).eval()
    watched = [_Watched(mlp) for mlp in mlps]
    hooks = [
        model.get_submodule(w.mlp.module).register_forward_pre_hook(w.enter, with_kwargs=True)
        for w in watched
    ]
    hooks += [model.get_submodule(w.mlp.output).register_forward_hook(w.leave) for w in watched]
    generator = torch.Generator(model.device).manual_seed(seed)
    length = tokens.shape[1]
    at_once = sequences_at_once(length, vocabulary(model), max(1, AT_ONCE // length))
    done = 0
    try:
        with removed(hooks):
            for ids in tokens.split(at_once):
                with torch.enable_grad(), fast_products(model.device, mlps[0].hidden_size):
                    logits = model(**text_inputs(model, ids)).logits
                chances = logits.flatten(0, 1).float().log_softmax(-1)
                drawn = torch.multinomial(chances.detach().exp(), 1, generator=generator)
                (-chances.gather(1, drawn).sum()).backward()
                done += len(ids)
                progress(done, len(tokens))
    except RuntimeError as fault:  # no backward, numbers that are none, too little of a GPU's memory
        raise DLRError(f"a backward pass failed: {first_line(fault)}") from fault
    found: dict[int, list[tuple[str, float, float]]] = {}
    for w in watched:
        if not w.slopes:
            raise DLRError(f"{w.mlp.module} has no part in what the model predicts")
        if not torch.cat(w.sizes + w.slopes).isfinite().all():
            raise DLRError(f"{w.mlp.module} writes what is too large to be squared, or no numbers")
        error = expected_error(w.linear(), train_tokens)
        found.setdefault(w.mlp.layer, []).append((w.mlp.module, error, _MEASURED * w.formula(error)))
    return [
        LayerCost(
            layer,
            tuple(name for name, _, _ in of),
            sum(error for _, error, _ in of) / len(of),
            sum(kl for _, _, kl in of),
        )
        for layer, of in sorted(found.items())
    ]


def cheapest(costs: Sequence[LayerCost], count: int) -> list[int]:
    """The numbers of the `count` layers that cost least, in their order.

    Raises:
        DLRError: Where that many do not cost anything: an MLP whose output is nothing cannot be distilled.
    """
    alive = sorted((cost for cost in costs if cost.kl > 0), key=lambda cost: cost.kl)
    if len(alive) < count:
        raise DLRError(
            f"--layers auto:{count}: of {len(costs)} layers {len(alive)} have an MLP that does anything"
        )
    return sorted(cost.layer for cost in alive[:count])
