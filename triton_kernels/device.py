"""What the kernels and their launchers share."""

import triton
import triton.language as tl
from torch import Tensor

# transformers' names -> what `activate` computes. A chain with another activation runs in plain torch.
KERNEL_ACTS = {
    "gelu": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "linear": "linear",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


# `input_precision` of every product: float32 weights are multiplied as such, not rounded to tf32 (1e-3). 16-bit ones
# are not concerned, but AMD's gfx90a and gfx950 refuse "tf32" for them too.
EXACT = tl.constexpr("ieee")


def strides(t: Tensor | None) -> tuple[int, int]:
    """Of the first two dimensions; 0 for what is not there."""
    return (0, 0) if t is None else (t.stride(0), t.stride(1))


@triton.jit
def activate(p, ACT: tl.constexpr):
    """The activation named by one of KERNEL_ACTS' values, of a float32 tile; tested against ACTIVATIONS."""
    if ACT == "silu":
        y = p * tl.sigmoid(p)
    elif ACT == "gelu":
        y = 0.5 * p * (1.0 + tl.erf(p * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # 0.5 p (1 + tanh u) = p sigmoid(2u), u = sqrt(2/pi) (p + 0.044715 p^3)
        y = p * tl.sigmoid(1.5957691216057308 * (p + 0.044715 * p * p * p))
    elif ACT == "quick_gelu":
        y = p * tl.sigmoid(1.702 * p)
    elif ACT == "relu":
        y = tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "relu2":
        y = tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = y * y
    elif ACT == "sigmoid":
        y = tl.sigmoid(p)
    elif ACT == "tanh":
        y = 2.0 * tl.sigmoid(2.0 * p) - 1.0
    else:
        tl.static_assert(ACT == "linear")
        y = p
    return y
