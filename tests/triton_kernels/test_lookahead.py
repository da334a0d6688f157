"""Look-ahead is the chain: against a float64 chain, step by step, on fresh random weights."""

import pytest
import torch
from torch import Tensor

from dlr_lock.triton_kernels import ACTIVATIONS, chain_reference, gram_blocks, lookahead


def drawn(lanes: int, depth: int, rank: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights of a chain whose updates are about half as large as x."""
    shape = (lanes, depth, rank, hidden)
    A = torch.randn(shape) / hidden**0.5
    B = torch.randn(shape) / (depth * rank) ** 0.5
    return A.to(dtype), B.to(dtype)


def error(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Tensor, bias: Tensor, act: str):
    """RMS of the difference over RMS of the float64 chain."""
    wanted = chain_reference(*(t.double() for t in (x, A, B, scale, bias)), act=act)
    return ((y.double() - wanted).square().mean() / wanted.square().mean()).sqrt().item()


SHAPES = [
    # lanes, depth, rank, hidden, tokens, block
    (1, 12, 16, 96, 1, 64),
    (1, 7, 32, 80, 9, 96),  # a ragged last block
    (3, 5, 16, 40, 4, 32),
    (4, 6, 48, 64, 1, 4096),  # one block
    (2, 4, 16, 33, 5, 1),  # a step a block, features that are no multiple of anything
    (1, 1, 16, 16, 2, 128),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_is_the_chain(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *sizes, hidden, tokens, block = shape
    A, B = drawn(*sizes, hidden, dtype)
    scale, bias = torch.rand(hidden), torch.randn(hidden)
    x = torch.randn(tokens, hidden, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    rest = (x, A, B, scale, bias, "silu")
    got = error(lookahead(*rest, block=block), *rest)
    # float32: scale and bias are that in the float64 chain too; bfloat16: a state rounded to it gives 1.4e-2
    assert got < {torch.float64: 1e-6, torch.float32: 3e-6, torch.bfloat16: 6e-3}[dtype]


def test_bfloat16_weights_meet_the_bound_of_a_real_shape() -> None:
    A, B = drawn(1, 36, 64, 576, torch.bfloat16)
    rest = (torch.randn(64, 576), A, B, torch.rand(576), torch.randn(576), "silu")
    naive = error(chain_reference(*rest[:5]), *rest)
    for block in (64, 128, 512):
        got = error(lookahead(*rest, block=block), *rest)
        assert got < 3e-3 * (36 / 32) ** 0.5 and got < 1.5 * naive


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_every_activation(act: str) -> None:
    A, B = drawn(2, 5, 16, 48, torch.float32)
    rest = (torch.randn(6, 48), A, B / 2, torch.rand(48), torch.randn(48), act)
    # Squares make a float32 chain's own error large.
    assert error(lookahead(*rest, block=48), *rest) < max(
        3e-6, 2 * error(chain_reference(*rest[:5], act=act), *rest)
    )


def test_any_leading_shape_and_dtype_of_x() -> None:
    A, B = drawn(1, 5, 16, 48, torch.bfloat16)
    scale, bias = torch.rand(48), torch.randn(48)
    x = torch.randn(2, 3, 48).to(torch.bfloat16)
    y = lookahead(x, A, B, scale, bias)
    assert y.shape == x.shape and y.dtype == torch.bfloat16
    assert (
        torch.equal(y[1], lookahead(x[1], A, B, scale, bias))
        or error(y[1], x[1], A, B, scale, bias, "silu") < 5e-3
    )
    assert lookahead(x[:0], A, B, scale, bias).shape == (0, 3, 48)


@pytest.mark.parametrize("broken", ["zeroed", "transposed", "shifted"])
def test_a_wrong_gram_block_is_seen(broken: str) -> None:
    A, B = drawn(1, 8, 16, 64, torch.float32)
    rest = (torch.randn(4, 64), A, B, torch.ones(64), torch.zeros(64), "silu")
    gram = gram_blocks(A, B, block=64)
    assert error(lookahead(*rest, gram=gram), *rest) < 3e-6
    tile = gram[0, 1, 16:32, 32:48]
    if broken == "shifted":
        gram = gram.roll(1, 1)
    else:
        tile.copy_(torch.zeros_like(tile) if broken == "zeroed" else tile.T.clone())
    assert error(lookahead(*rest, gram=gram), *rest) > 1e-3


def test_a_token_of_nan_stays_alone() -> None:
    A, B = drawn(2, 6, 16, 48, torch.float32)
    x = torch.randn(5, 48)
    spoiled = x.clone()
    spoiled[2, 7] = float("nan")
    y, z = (lookahead(t, A, B, torch.ones(48), torch.zeros(48), block=48) for t in (x, spoiled))
    assert z[2].isnan().all() and torch.equal(y[[0, 1, 3, 4]], z[[0, 1, 3, 4]])


def test_shapes_that_do_not_fit_are_named() -> None:
    A, B = drawn(1, 6, 16, 48, torch.float32)
    one = torch.ones(48)
    with pytest.raises(ValueError, match="47 features do not fit a chain of 48"):
        lookahead(torch.randn(3, 47), A, B, one, one)
    with pytest.raises(ValueError, match=r"Gram blocks of shape .*\(1, 6, 16, 48\)"):
        lookahead(torch.randn(3, 48), A, B, one, one, gram=torch.zeros(1, 4, 32, 32))


def test_blocks_of_one_step_take_no_memory() -> None:
    A, B = drawn(2, 5, 48, 64, torch.float32)
    rest = (torch.randn(6, 64), A, B, torch.rand(64), torch.randn(64), "silu")
    gram = gram_blocks(A, B, block=64)
    assert gram.shape == (2, 5, 48, 0) and gram.nbytes == 0
    assert error(lookahead(*rest, gram=gram), *rest) < 3e-6
    with pytest.raises(ValueError, match="Gram blocks of shape"):
        lookahead(*rest, gram=torch.zeros(2, 5, 48, 48))
