"""One pass of random tokens through a model: what each module gets and gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..runtime.errors import DLRError
from .formula import Inside
from .structure import (
    ACT_NAME,
    Matrix,
    act_name,
    is_act,
    is_linear,
    layer_number,
    module_names,
    sizes_of,
    within,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 8


class Trial:
    """What modules get and give in one pass of 8 random tokens through the model.

    count       calls of each module watched
    inputs      their first input
    """

    def __init__(self, model: PreTrainedModel, whole: Sequence[str]) -> None:
        self.model = model
        self.count: dict[str, int] = {}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.odd: set[str] = set()  # called with anything else than one tensor, or by keyword
        names = [n for n in module_names(model) if layer_number(model, n) is not None]
        # Linear maps, and what may be an activation: ends and middle of a loose MLP.
        parts = {n: model.get_submodule(n) for n in names}
        small = [n for n, p in parts.items() if is_linear(p) or is_act(p) or not list(p.parameters())]
        hooks = []
        for name in {*whole, *small}:
            self.count[name] = 0
            hooks.append(model.get_submodule(name).register_forward_hook(self._hook(name), with_kwargs=True))
        try:
            _one_pass(model)
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.count[name] += 1
            tensors = [a for a in (*args, *kwargs.values()) if a is not None]
            if (
                len(tensors) != 1
                or not args
                or not isinstance(args[0], Tensor)
                or not isinstance(output, Tensor)
            ):
                self.odd.add(name)
                return
            self.inputs[name], self.outputs[name] = args[0], output

        return hook

    def single_tensor(self, name: str) -> bool:
        """Whether the pass came through the module, with one tensor in and one of its shape out."""
        if name in self.odd or name not in self.inputs:
            return False
        return self.inputs[name].shape == self.outputs[name].shape and self.inputs[name].is_floating_point()

    def loose(self, taken: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...], Inside]]:
        """MLPs without a module of their own: an activation between what one linear map gives and another gets.

        Yields (the first map, the activation and the second map, what they compute), names absolute.
        """
        parts = [n for n in self.inputs if n not in self.odd and not within(n, taken)]
        linears = [n for n in parts if is_linear(self.model.get_submodule(n))]
        for act in parts:
            module = self.model.get_submodule(act)
            if is_linear(module) or not (is_act(module) or ACT_NAME.search(act)):
                continue
            layer = [n for n in linears if _prefix(n) == _prefix(act)]
            first = [n for n in layer if _same(self.outputs[n], self.inputs[act])]
            second = [n for n in layer if _same(self.outputs[act], self.inputs[n])]
            if len(first) != 1 or len(second) != 1:
                continue
            d, f = sizes_of(self.model.get_submodule(first[0]))
            if sizes_of(self.model.get_submodule(second[0])) == (f, d):
                inside = Inside(d, f, act_name(module), False, Matrix(first[0]), None, Matrix(second[0]))
                yield first[0], (act, second[0]), inside


def _one_pass(model: PreTrainedModel) -> None:
    table = model.get_input_embeddings()
    rows, device = table.weight.shape[0], table.weight.device
    ids = torch.randint(rows, (1, _TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    # An encoder-decoder is fed on both sides.
    both = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    try:
        model(input_ids=ids, **both)
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise DLRError(f"the model does not run on text alone: {reason[0]}") from error


def _same(a: Tensor, b: Tensor) -> bool:
    """The same values: the tensor itself, or a copy, as dropout may make. (Both are kept alive, so the same
    address is the same tensor, even where the activation then wrote over it.)"""
    if a.numel() != b.numel() or a.dtype != b.dtype:
        return False
    return a.data_ptr() == b.data_ptr() or torch.equal(a.flatten(), b.flatten())


def _prefix(name: str) -> str:
    """The path up to its first number."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else ""
