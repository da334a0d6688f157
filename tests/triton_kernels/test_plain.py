"""Plain torch's steps are the chain: against a float64 chain, on fresh random weights."""

import pytest
import torch
from random_chains import drawn, error

from dlr_lock.triton_kernels import backend, chain_reference, dlr_net


@pytest.mark.parametrize("tokens", [0, 1, 40])
@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_is_the_chain_and_leaves_the_tokens_alone(tokens: int, lanes: int, act: str) -> None:
    chain, x = drawn(lanes, 6, 16, 72, torch.float32, act), torch.randn(2, tokens, 72)
    before = x.clone()
    with backend("plain"), torch.no_grad():
        y = dlr_net(x, chain)
    assert y.shape == x.shape and torch.equal(x, before)
    assert tokens == 0 or error(y, x, chain) < 1e-6


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_lose_no_more_than_by_the_definition(lanes: int, dtype: torch.dtype) -> None:
    """On a trained chain of 12 steps of bfloat16 either loses 3.4e-3; a state in bfloat16 would lose 8.6e-3."""
    chain, x = drawn(lanes, 12, 32, 256, dtype), torch.randn(64, 256)
    with backend("plain"), torch.no_grad():
        got = error(dlr_net(x, chain), x, chain)
    naive = error(chain_reference(x, chain), x, chain)
    assert got < 1.1 * naive and got < 4e-3
