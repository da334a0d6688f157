"""The dtypes of weights, by the names that users write."""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name without its module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
