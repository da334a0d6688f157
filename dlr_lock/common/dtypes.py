"""The dtypes of weights, by the names that users write, and of a training's products."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name without its module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


# Features from which products in bfloat16 are the faster ones: of fewer it is the copies that take the time.
_PRODUCT_FEATURES = 256
_wanted: ContextVar[torch.dtype | None] = ContextVar("products", default=None)


def product_dtype(device: torch.device, features: int) -> torch.dtype:
    """The dtype of a training's matrix products on a device: bfloat16 where it multiplies these faster, else float32.

    On an EPYC with AVX512_BF16 a core does 115 GFLOP/s instead of 48, and a step of 512 tokens of 1x12x192 takes 106
    ms instead of 197; a fit's error is the same (0.2584 and 0.2579 at layer 11 of SmolLM2; `python -m
    benchmarks.fidelity products` compares them). Weights, gradients, momentum and a chain's state stay in float32.
    Within `products_in` it is the dtype of that.

    Args:
        device: Where it trains; the meta device, where steps are counted, counts as one that is faster.
        features: The hidden size.
    """
    if (wanted := _wanted.get()) is not None:
        return wanted
    if features < _PRODUCT_FEATURES:
        fast = False
    elif device.type == "meta":
        fast = True
    elif device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def products_in(dtype: torch.dtype) -> Iterator[None]:
    """A block in which this thread's trainings multiply in `dtype`, whatever is fast, so that both can be compared."""
    before = _wanted.set(dtype)
    try:
        yield
    finally:
        _wanted.reset(before)


def fast_products(device: torch.device, features: int) -> torch.autocast:
    """A block in which a model of so many hidden features multiplies in `product_dtype`, whatever its weights are.

    A pass of SmolLM2-135M takes half the time so, on a CPU with AVX512_BF16; hidden states move by 1e-4 of their
    squares.
    """
    dtype = product_dtype(device, features)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
