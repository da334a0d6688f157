"""Activations between the two products of a step, under the names that transformers uses.

Each is a pure function of a float tensor of any shape and dtype. The two that carry parameters in
transformers (`prelu`, `xielu`) stand here at their initial values, since a chain has no place for more.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_LAPLACE_MEAN, _LAPLACE_STD = 0.707107, 0.282095  # Ma et al., arXiv 2209.10655, section 3.4
_XIELU_ALPHA, _XIELU_BETA = 0.8, 0.5  # Huang and Schlag, arXiv 2411.13010, initial values


def _gelu_tanh(p: Tensor) -> Tensor:
    return F.gelu(p, approximate="tanh")


def _xielu(p: Tensor) -> Tensor:
    negative = _XIELU_ALPHA * (torch.expm1(p.clamp(max=-1e-6)) - p)
    return torch.where(p > 0, _XIELU_ALPHA * p * p, negative) + _XIELU_BETA * p


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": lambda p: F.gelu(p).clamp(-10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": lambda p: 0.5 * (1 + torch.erf((p - _LAPLACE_MEAN) / (_LAPLACE_STD * math.sqrt(2)))),
    "leaky_relu": F.leaky_relu,
    "linear": lambda p: p,
    "mish": F.mish,
    "prelu": lambda p: F.leaky_relu(p, 0.25),
    "quick_gelu": lambda p: p * torch.sigmoid(1.702 * p),
    "relu": F.relu,
    "relu2": lambda p: F.relu(p).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda p: F.softplus(p).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
    "xielu": _xielu,
}
