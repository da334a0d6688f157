"""Plain torch's steps are the chain: against a float64 chain, on fresh random weights."""

import pytest
import torch

from dlr_lock.triton_kernels import ChainWeights, backend, chain_reference, dlr_net


def drawn(
    lanes: int, depth: int, rank: int, hidden: int, dtype: torch.dtype, act: str = "silu"
) -> ChainWeights:
    """A chain whose updates are about half as large as x; scale and bias in float32."""
    shape = (lanes, depth, rank, hidden)
    A, B = torch.randn(shape) / hidden**0.5, torch.randn(shape) / (depth * rank) ** 0.5
    return ChainWeights(A.to(dtype), B.to(dtype), torch.rand(hidden), torch.randn(hidden), act=act)


def error(y: torch.Tensor, x: torch.Tensor, chain: ChainWeights) -> float:
    """RMS of the difference over RMS of the float64 chain."""
    wanted = chain_reference(x.double(), chain.to(torch.float64))
    return ((y.double() - wanted).square().mean() / wanted.square().mean()).sqrt().item()


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
