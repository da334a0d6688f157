"""Mixtures of experts in a model, and what one call of their experts says: tokens, their experts, the weights of these.

transformers keeps a mixture's experts in one module, which gets tokens with their routing. What is inside plays no part
here: an expert is what that module makes of tokens that are all routed to it (`one_expert`), and that it is so is
settled by running it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ...common.errors import DLRError
from ...common.hooks import first_argument, frozen, removed
from ...common.weights import awake
from ...runtime.experts import one_expert, stacked
from ..mlp_matching import MLP, TeacherWeights, layer_number, one_pass, structure_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_HALF = 2e-2  # of 16 bits


@dataclass(frozen=True)
class Mixture(MLP):
    """The experts of one mixture: what DLRExperts take the place of. `params` are those of all experts.

    Attributes:
        experts: How many there are, E.
        chosen: How many of them a token is given to, k.
        stacked: Whether they are given every expert's tokens one after the other, as Llama 4's are.
    """

    experts: int
    chosen: int
    stacked: bool

    @property
    def expert_params(self) -> int:
        """Parameters of one expert."""
        return self.params // self.experts


class Routing(NamedTuple):
    """Which experts tokens are given to: chosen [N, k] int64, E or more for none; weight [N, k] float32, what the
    experts' outputs are multiplied with."""

    chosen: Tensor
    weight: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens of one expert, [n] int64, and its weight for each, [n]."""
        there = self.chosen == expert
        rows = there.any(1).nonzero()[:, 0]
        return rows, torch.where(there, self.weight, 0.0).sum(1)[rows]


def read_call(mlp: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Routing | None]:
    """What an MLP was called with: x, and of a mixture its tokens x [N, d] and their routing.

    Raises:
        DLRError: On a token that stacked experts get more than once: it is scaled for each of them, so that there is no
            x that all share.
    """
    first = first_argument(args, kwargs)
    if not isinstance(mlp, Mixture):
        return first, None
    if not mlp.stacked:
        index, weight = [
            part for part in (*args[1:], *kwargs.values()) if isinstance(part, Tensor) and part is not first
        ]
        return first, Routing(index, weight.float())
    rows = first.view(mlp.experts, -1, first.shape[-1])
    there = (rows != 0).any(-1)
    if (there.sum(0) > 1).any():
        raise DLRError(
            f"{mlp.module} gives a token to several experts, scaled for each: such a mixture is locked with one expert "
            "a token alone; leave its layer out with --layers"
        )
    index = there.int().argmax(0)
    x = rows[index, torch.arange(len(index), device=index.device)]
    return x, Routing(index[:, None], torch.ones_like(index, dtype=torch.float32)[:, None])


def read_output(mlp: object, y: Tensor) -> Tensor:
    """What an MLP gave; of stacked experts what each token got, [N, d]."""
    if isinstance(mlp, Mixture) and mlp.stacked:
        return y.view(mlp.experts, -1, y.shape[-1]).sum(0)
    return y


def together(experts: nn.Module, count: int, x: Tensor, routing: Routing) -> Tensor:
    """What experts make of tokens x [N, d] by their routing, one expert after the other, [N, d] float32."""
    total = torch.zeros(x.shape, device=x.device)
    for expert in range(count):
        rows, weight = routing.of(expert)
        if len(rows):
            total.index_add_(0, rows, one_expert(experts, expert, x[rows]).float() * weight[:, None].float())
    return total


def find_mixtures(model: PreTrainedModel) -> tuple[list[Mixture], list[str]]:
    """The mixtures of a model, found by running 8 random tokens through it.

    Of a model on the meta device, which has no numbers, experts are not run: what they are called with says all but
    whether they are called as `one_expert` does, which is taken for granted.

    Args:
        model: Any transformers model, whose MLPs may be mixtures.

    Returns:
        Those whose experts are called as `one_expert` does, in model order; the names of those that are not.
    """
    there = _called_experts(model)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}

    def hook(name: str) -> Any:
        return lambda module, args, kwargs, output: calls.__setitem__(name, (args, kwargs, output))

    if not there:
        return [], []
    numbers = model.device.type != "meta"
    with frozen(model):
        with (
            removed([m.register_forward_hook(hook(n), with_kwargs=True) for n, m in there.items()]),
            nullcontext() if numbers else passed_over(model),
        ):
            one_pass(model)
        verdicts: dict[Any, bool] = {}
        found, odd = [], []
        for name, module in there.items():
            mixture = _mixture(model, name, module, calls)
            key = structure_of(module)
            if mixture is not None and key not in verdicts:
                verdicts[key] = not numbers or _as_thought(module, mixture, *calls[name])
            if mixture is not None and verdicts[key]:
                found.append(mixture)
            else:
                odd.append(name)
    return found, odd


def _called_experts(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Experts") and layer_number(model, name) is not None
    }


@contextmanager
def passed_over(model: nn.Module) -> Iterator[None]:
    """A mixture's experts compute nothing: they give what has the shape of their tokens, without numbers."""
    modules = list(_called_experts(model).values())
    for module in modules:
        module.__dict__["forward"] = lambda *args, **kwargs: torch.empty_like(first_argument(args, kwargs))
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def _mixture(model: nn.Module, name: str, module: nn.Module, calls: dict[str, Any]) -> Mixture | None:
    parameters = list(module.parameters())
    count = getattr(module, "num_experts", None) or (parameters[0].shape[0] if parameters else 0)
    total = sum(p.numel() for p in parameters)
    if name not in calls or not isinstance(count, int) or not total or total % count:
        return None
    first = first_argument(*calls[name][:2])
    if not isinstance(first, Tensor) or first.dim() != 2 or not isinstance(calls[name][2], Tensor):
        return None
    if first.shape != calls[name][2].shape:
        return None
    d = first.shape[-1]
    whole = stacked(module)
    others = [*calls[name][0][1:], *calls[name][1].values()]
    index = [part for part in others if isinstance(part, Tensor) and part is not first]
    gated = hasattr(module, "gate_up_proj")
    f = max(1, total // count // (3 if gated else 2) // d)
    act = type(getattr(module, "act_fn", None)).__name__ if hasattr(module, "act_fn") else "unknown"
    return Mixture(
        layer=-1, module=name, identity=(), hidden_size=d, intermediate_size=f, gated=gated, act=act, params=total,
        up=None, gate=None, down=None, experts=count, chosen=1 if whole or not index else index[0].shape[-1],
        stacked=whole,
    )  # fmt: skip


def _as_thought(module: nn.Module, mixture: Mixture, args: Any, kwargs: Any, output: Tensor) -> bool:
    """Whether the experts one by one give what they gave together. (Longcat's numbers beyond the last expert give
    tokens back as they are, which chains do not.)"""
    if getattr(module, "zero_expert_num", 0):
        return False
    try:
        x, routing = read_call(mixture, args, kwargs)
        assert routing is not None
        if not mixture.stacked and routing.chosen.shape != routing.weight.shape:
            return False
        wanted = read_output(mixture, output).float()
        got = together(module, mixture.experts, x, routing)
        tolerance = _TOLERANCE.get(x.dtype, _TOLERANCE_HALF)
        return bool((got - wanted).norm() <= tolerance * wanted.norm().clamp(min=1e-30))
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError):
        return False  # it wants something else


def teacher_of(module: nn.Module, expert: int) -> TeacherWeights | None:
    """One expert's own matrices, float32; None where they are kept in a way that is not known."""
    awake(module)
    down = getattr(module, "down_proj", None)
    fused, plain = getattr(module, "gate_up_proj", None), getattr(module, "up_proj", None)
    known = [
        p for p in (down, fused if fused is not None else plain) if isinstance(p, Tensor) and p.dim() == 3
    ]
    if len(known) < 2:
        return None
    last, first = (p[expert].detach().float() for p in known)
    if getattr(module, "is_transposed", stacked(module)):
        last, first = last.T, first.T  # now [d, f] and [2f, d] or [f, d]
    d, f = last.shape
    if fused is None:
        return TeacherWeights(first, None, last) if first.shape == (f, d) else None
    if first.shape != (2 * f, d):
        return None
    halves = first.chunk(2) if getattr(module, "is_concatenated", True) else (first[::2], first[1::2])
    return TeacherWeights(halves[1].contiguous(), halves[0].contiguous(), last)


def router_of(model: nn.Module, mixture: Mixture) -> Tensor | None:
    """The [E, d] matrix by which the mixture's router scores experts, None where there is not one such."""
    block = model.get_submodule(mixture.module.rpartition(".")[0])
    inside = f"{mixture.module.rpartition('.')[2]}."
    shape = (mixture.experts, mixture.hidden_size)
    found = [
        getattr(awake(block.get_submodule(n.rpartition(".")[0])), n.rpartition(".")[2])
        for n, p in block.named_parameters()
        if p.shape == shape and not n.startswith(inside)
    ]
    return found[0].detach() if len(found) == 1 else None


def named(numbers: Sequence[int]) -> str:
    """Experts' numbers for a sentence: "3, 8 and 11", the first ten of many."""
    every = [str(n) for n in numbers]
    if len(every) > 10:
        return f"{', '.join(every[:10])} and {len(every) - 10} more"
    return every[0] if len(every) == 1 else f"{', '.join(every[:-1])} and {every[-1]}"
