"""Activations between the two products of a step, under the names that transformers uses: one table of all forms.

To add one, write an entry of `TABLE`: its torch function, of a float tensor of any shape and dtype; and, for the
kernels to run it too, the same function of a float32 tile in Triton's language and as an expression in C++, without
which its chains run in plain torch. The two that carry parameters in transformers (`prelu`, `xielu`) stand here at
their initial values, since a chain has no place for more.

Triton is Linux only and takes half a second to import: the tile functions are plain ones until `triton_form` is first
called, which imports it.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import triton.language as tl

_LAPLACE_MEAN, _LAPLACE_STD = 0.707107, 0.282095  # Ma et al., arXiv 2209.10655, section 3.4
_XIELU_ALPHA, _XIELU_BETA = 0.8, 0.5  # Huang and Schlag, arXiv 2411.13010, initial values


class Activation(NamedTuple):
    """One activation in all its forms.

    Attributes:
        names: What transformers calls it, the usual name first.
        torch_fn: A differentiable function of a float tensor of any shape and dtype, giving one of the same.
        triton_fn: The same function of a float32 tile, in Triton's language (`tl`); None where the kernels have none.
        native: The same of a float32 vector p, an expression of C++ with what native.cpp defines; None as above.
        common: Whether it is tried on an MLP whose code does not name its activation.
    """

    names: tuple[str, ...]
    torch_fn: Callable[[Tensor], Tensor]
    triton_fn: Callable[[Any], Any] | None = None
    native: str | None = None
    common: bool = False


def _gelu_tanh(p: Tensor) -> Tensor:
    return F.gelu(p, approximate="tanh")


def _xielu(p: Tensor) -> Tensor:
    negative = _XIELU_ALPHA * (torch.expm1(p.clamp(max=-1e-6)) - p)
    return torch.where(p > 0, _XIELU_ALPHA * p * p, negative) + _XIELU_BETA * p


def _gelu_tile(p):
    return 0.5 * p * (1.0 + tl.erf(p * 0.7071067811865476))


def _gelu_tanh_tile(p):  # 0.5 p (1 + tanh u) = p sigmoid(2u), u = sqrt(2/pi) (p + 0.044715 p^3)
    return p * tl.sigmoid(1.5957691216057308 * (p + 0.044715 * p * p * p))


def _linear_tile(p):
    return p


def _quick_gelu_tile(p):
    return p * tl.sigmoid(1.702 * p)


def _relu_tile(p):
    return tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL)


def _relu2_tile(p):
    y = tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return y * y


def _sigmoid_tile(p):
    return tl.sigmoid(p)


def _silu_tile(p):
    return p * tl.sigmoid(p)


def _tanh_tile(p):
    return 2.0 * tl.sigmoid(2.0 * p) - 1.0


TABLE = (
    Activation(("silu", "swish"), F.silu, _silu_tile, "p * sigmoid(p)", common=True),
    Activation(
        ("gelu", "gelu_python"), F.gelu, _gelu_tile, "0.5f * p * (1.f + erf(0.70710678f * p))", common=True
    ),
    Activation(
        ("gelu_pytorch_tanh", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh"),
        _gelu_tanh,
        _gelu_tanh_tile,
        "p * sigmoid(1.5957691216f * (p + 0.044715f * p * p * p))",
        common=True,
    ),
    Activation(("relu",), F.relu, _relu_tile, "positive(p)", common=True),
    Activation(
        ("relu2",), lambda p: F.relu(p).square(), _relu2_tile, "positive(p) * positive(p)", common=True
    ),
    Activation(
        ("quick_gelu",),
        lambda p: p * torch.sigmoid(1.702 * p),
        _quick_gelu_tile,
        "p * sigmoid(1.702f * p)",
        common=True,
    ),
    Activation(("sigmoid",), torch.sigmoid, _sigmoid_tile, "sigmoid(p)", common=True),
    Activation(("tanh",), torch.tanh, _tanh_tile, "2.f * sigmoid(2.f * p) - 1.f", common=True),
    Activation(("mish",), F.mish, common=True),
    Activation(("linear",), lambda p: p, _linear_tile, "p"),
    Activation(("gelu_10",), lambda p: F.gelu(p).clamp(-10, 10)),
    Activation(("hardswish",), F.hardswish),
    Activation(
        ("laplace",), lambda p: 0.5 * (1 + torch.erf((p - _LAPLACE_MEAN) / (_LAPLACE_STD * math.sqrt(2))))
    ),
    Activation(("leaky_relu",), F.leaky_relu),
    Activation(("prelu",), lambda p: F.leaky_relu(p, 0.25)),
    Activation(("relu6",), F.relu6),
    Activation(("sqrtsoftplus",), lambda p: F.softplus(p).sqrt()),
    Activation(("xielu",), _xielu),
)

ACTIVATIONS = {name: a.torch_fn for a in TABLE for name in a.names}
KERNEL_ACTS = {name: a.triton_fn for a in TABLE if a.triton_fn for name in a.names}
NATIVE_ACTS = {name: a.native for a in TABLE if a.native for name in a.names}
COMMON_ACTS = tuple(a.names[0] for a in TABLE if a.common)


def triton_form(act: str) -> Any:
    """The activation as the kernels call it.

    Args:
        act: One of KERNEL_ACTS.

    Returns:
        A `triton.jit` function of a float32 tile, the same one for all names of an activation: an argument of a kernel
        that is compiled in.
    """
    return _compiled(KERNEL_ACTS[act])


@cache
def _compiled(function: Callable[[Any], Any]) -> Any:
    global tl  # in which the tile functions look up Triton's language
    import triton
    import triton.language as tl

    return triton.jit(function)
