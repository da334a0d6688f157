"""What the kernels and their launchers share."""

import triton.language as tl
from torch import Tensor

# `input_precision` of every product: float32 weights are multiplied as such, not rounded to tf32 (1e-3). 16-bit ones
# are not concerned, but AMD's gfx90a and gfx950 refuse "tf32" for them too.
EXACT = tl.constexpr("ieee")


def strides(t: Tensor | None) -> tuple[int, int]:
    """The strides of the first two dimensions, in elements; 0 for what is not there."""
    return (0, 0) if t is None else (t.stride(0), t.stride(1))
