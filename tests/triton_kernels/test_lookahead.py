"""Look-ahead is the chain: against a float64 chain, step by step, on fresh random weights."""

import pytest
import torch
from torch import Tensor

from dlr_lock.triton_kernels import ACTIVATIONS, chain_reference, gram_blocks, lookahead


def drawn(
    lanes: int, depth: int, rank: int, hidden: int, gated: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights of a chain whose updates are about half as large as x."""
    shape = (lanes, depth, rank, hidden)
    A, G = (torch.randn(shape) / hidden**0.5 for _ in range(2))
    B = torch.randn(shape) / (depth * rank) ** 0.5
    return A.to(dtype), B.to(dtype), G.to(dtype) if gated else None


def error(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Tensor, bias: Tensor, G: Tensor | None, act: str
):
    """RMS of the difference over RMS of the float64 chain."""
    wanted = chain_reference(
        x.double(),
        A.double(),
        B.double(),
        scale.double(),
        bias.double(),
        None if G is None else G.double(),
        act,
    )
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
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_is_the_chain(shape: tuple[int, ...], gated: bool, dtype: torch.dtype) -> None:
    *sizes, hidden, tokens, block = shape
    A, B, G = drawn(*sizes, hidden, gated, dtype)
    scale, bias = torch.rand(hidden), torch.randn(hidden)
    x = torch.randn(tokens, hidden, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    rest = (x, A, B, scale, bias, G, "silu")
    got = error(lookahead(*rest[:6], block=block), *rest)
    # float32: scale and bias are that in the float64 chain too; bfloat16: a state rounded to it gives 1.4e-2
    assert got < {torch.float64: 1e-6, torch.float32: 3e-6, torch.bfloat16: 6e-3}[dtype]


def test_bfloat16_weights_meet_the_bound_of_a_real_shape() -> None:
    A, B, _ = drawn(1, 36, 64, 576, False, torch.bfloat16)
    rest = (torch.randn(64, 576), A, B, torch.rand(576), torch.randn(576), None, "silu")
    naive = error(chain_reference(*rest[:6]), *rest)
    for block in (64, 128, 512):
        got = error(lookahead(*rest[:6], block=block), *rest)
        assert got < 3e-3 * (36 / 32) ** 0.5 and got < 1.5 * naive


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gated", [False, True])
def test_every_activation(act: str, gated: bool) -> None:
    A, B, G = drawn(2, 5, 16, 48, gated, torch.float32)
    rest = (torch.randn(6, 48), A, B / 2, torch.rand(48), torch.randn(48), G, act)
    # Squares and products of them make a float32 chain's own error large: 5e-6 was seen of relu2, gated.
    assert error(lookahead(*rest, block=48), *rest) < max(3e-6, 2 * error(chain_reference(*rest), *rest))


def test_any_leading_shape_and_dtype_of_x() -> None:
    A, B, _ = drawn(1, 5, 16, 48, False, torch.bfloat16)
    scale, bias = torch.rand(48), torch.randn(48)
    x = torch.randn(2, 3, 48).to(torch.bfloat16)
    y = lookahead(x, A, B, scale, bias)
    assert y.shape == x.shape and y.dtype == torch.bfloat16
    assert (
        torch.equal(y[1], lookahead(x[1], A, B, scale, bias))
        or error(y[1], x[1], A, B, scale, bias, None, "silu") < 5e-3
    )
    assert lookahead(x[:0], A, B, scale, bias).shape == (0, 3, 48)


@pytest.mark.parametrize("broken", ["zeroed", "transposed", "shifted"])
def test_a_wrong_gram_block_is_seen(broken: str) -> None:
    A, B, _ = drawn(1, 8, 16, 64, False, torch.float32)
    rest = (torch.randn(4, 64), A, B, torch.ones(64), torch.zeros(64), None, "silu")
    gram = gram_blocks(A, B, block=64)
    assert error(lookahead(*rest, gram=gram), *rest) < 3e-6
    tile = gram[0, 0, 1, 16:32, 32:48]
    if broken == "shifted":
        gram = gram.roll(1, 2)
    else:
        tile.copy_(torch.zeros_like(tile) if broken == "zeroed" else tile.T.clone())
    assert error(lookahead(*rest, gram=gram), *rest) > 1e-3


def test_a_token_of_nan_stays_alone() -> None:
    A, B, _ = drawn(2, 6, 16, 48, False, torch.float32)
    x = torch.randn(5, 48)
    spoiled = x.clone()
    spoiled[2, 7] = float("nan")
    y, z = (lookahead(t, A, B, torch.ones(48), torch.zeros(48), block=48) for t in (x, spoiled))
    assert z[2].isnan().all() and torch.equal(y[[0, 1, 3, 4]], z[[0, 1, 3, 4]])


def test_shapes_that_do_not_fit_are_named() -> None:
    A, B, _ = drawn(1, 6, 16, 48, False, torch.float32)
    one = torch.ones(48)
    with pytest.raises(ValueError, match="47 features do not fit a chain of 48"):
        lookahead(torch.randn(3, 47), A, B, one, one)
    with pytest.raises(ValueError, match=r"Gram blocks of shape .*\(1, 6, 16, 48\)"):
        lookahead(torch.randn(3, 48), A, B, one, one, gram=torch.zeros(1, 1, 4, 32, 32))


def test_blocks_of_one_step_take_no_memory() -> None:
    A, B, G = drawn(2, 5, 48, 64, True, torch.float32)
    rest = (torch.randn(6, 64), A, B, torch.rand(64), torch.randn(64), G, "silu")
    gram = gram_blocks(A, B, G, block=64)
    assert gram.shape == (2, 2, 5, 48, 0) and gram.nbytes == 0
    assert error(lookahead(*rest, gram=gram), *rest) < 3e-6
    with pytest.raises(ValueError, match="Gram blocks of shape"):
        lookahead(*rest, gram=torch.zeros(2, 2, 5, 48, 48))
