"""What a model's modules look like from outside: linear maps, their sizes, activations, layer numbers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS, ACT2FN
from transformers.pytorch_utils import Conv1D

# Activations to try where a module holds none (it calls a function).
COMMON_ACTS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu", "sigmoid", "tanh", "mish")
# Last part of the name of what may be an activation of no class known to us: act_fn, activation, gelu_impl.
ACT_NAME = re.compile(r"(act|gelu)[^.]*$")


@dataclass(frozen=True)
class Matrix:
    """Rows begin:end of a linear map's [out, in] matrix; end None is the last."""

    name: str
    begin: int = 0
    end: int | None = None

    def weight(self, model: nn.Module) -> Tensor:
        module: Any = model.get_submodule(self.name)
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        return weight.detach()[self.begin : self.end]

    def within(self, outer: str) -> Matrix:
        """The same, named from inside the module `outer`."""
        return Matrix(self.name.removeprefix(outer + "."), self.begin, self.end)

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        """x [.., in] -> [.., rows], float32, bias included."""
        bias: Tensor | None = getattr(model.get_submodule(self.name), "bias", None)
        y = x.float() @ self.weight(model).float().T
        return y if bias is None else y + bias.detach()[self.begin : self.end].float()


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def sizes_of(module: Any) -> tuple[int, int]:
    """(in, out) of a linear map."""
    out, width = module.weight.shape
    return (out, width) if isinstance(module, Conv1D) else (width, out)


def module_names(model: nn.Module) -> list[str]:
    """Every module's name, in model order; experts and adapters are passed over."""
    return [
        name for name, _ in model.named_modules() if name and "expert" not in name and "lora_" not in name
    ]


def layer_number(model: nn.Module, name: str) -> int | None:
    """The layer number in a path: the first index into a ModuleList. None without one, and for the layer itself."""
    parent: nn.Module = model
    *path, _ = name.split(".")
    for part in path:
        if isinstance(parent, nn.ModuleList):
            return int(part)
        parent = parent.get_submodule(part)
    return None


def within(name: str, outer: Sequence[str]) -> bool:
    return any(name == other or name.startswith(other + ".") for other in outer)


def _linears(model: nn.Module, name: str) -> list[str] | None:
    """Names of the linear maps of a module that holds them directly and no other further down."""
    module = model.get_submodule(name)
    direct = [f"{name}.{child}" for child, part in module.named_children() if is_linear(part)]
    return direct if len(direct) == sum(map(is_linear, module.modules())) else None


def shape_of(model: nn.Module, name: str) -> tuple[list[str], str] | None:
    """(the d -> f or d -> 2f maps, the f -> d map) of a module that could be an MLP."""
    linears = _linears(model, name)
    if linears is None or len(linears) not in (2, 3) or not _one_argument(model.get_submodule(name)):
        return None
    sizes = {linear: sizes_of(model.get_submodule(linear)) for linear in linears}
    for down in reversed(linears):
        f, d = sizes[down]
        ups = [linear for linear in linears if linear != down]
        if all(sizes[up] == (d, f) for up in ups) or (len(ups) == 1 and sizes[ups[0]] == (d, 2 * f)):
            return ups, down
    return None


def _one_argument(module: nn.Module) -> bool:
    parameters = list(inspect.signature(module.forward).parameters.values())
    needed = [
        p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return bool(parameters) and len(needed) <= 1


def structure_of(module: nn.Module) -> Any:
    """Equal for modules that differ in their numbers alone: one trial does for all of them."""
    parts = tuple(
        (name, type(part), tuple((n, tuple(p.shape)) for n, p in part.named_parameters(recurse=False)))
        for name, part in module.named_modules()
    )
    # A setting such as Gemma 3n's activation sparsity differs from layer to layer.
    settings = {
        n: v for n, v in vars(module).items() if isinstance(v, bool | int | float | str) and "idx" not in n
    }
    return parts, tuple(sorted(settings.items()))


def is_act(module: nn.Module) -> bool:
    return type(module) in _act_classes() or type(module) in (
        nn.GELU,
        nn.SiLU,
        nn.ReLU,
        nn.Sigmoid,
        nn.Tanh,
        nn.Mish,
    )


def act_name(act: Any) -> str:
    """The ACT2FN name of an activation, by its class, else by its values (BLOOM has a gelu of its own)."""
    if type(act) in _act_classes() and type(act) is not nn.SiLU:
        return _act_classes()[type(act)]
    x = torch.linspace(-6, 6, 97)
    try:
        with torch.no_grad():
            y = act(x)
            for name in COMMON_ACTS:
                if torch.allclose(y, ACT2FN[name](x), atol=1e-5):
                    return name
    except (TypeError, RuntimeError):
        pass  # not a function of one tensor on the CPU: it keeps its own name
    return getattr(act, "__name__", type(act).__name__)


@cache
def _act_classes() -> dict[type, str]:
    classes: dict[type, str] = {}
    for name, cls in ACT2CLS.items():
        classes.setdefault(cls[0] if isinstance(cls, tuple) else cls, name)
    return classes
