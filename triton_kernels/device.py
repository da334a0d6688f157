"""What the kernels and their launchers share."""

import triton.language as tl

# `input_precision` of every product: float32 weights are multiplied as such, not rounded to tf32 (1e-3). 16-bit ones
# are not concerned, but AMD's gfx90a and gfx950 refuse "tf32" for them too.
EXACT = tl.constexpr("ieee")
