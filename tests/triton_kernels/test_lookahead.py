"""Look-ahead is the chain: against a float64 chain, step by step, on fresh random weights."""

import pytest
import torch
from random_chains import drawn, error, limit, rounded_state

from dlr_lock.triton_kernels import ACTIVATIONS, chain_reference, gram_blocks, lookahead
from dlr_lock.triton_kernels.lookahead import block_steps

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
    *sizes, tokens, block = shape
    chain = drawn(*sizes, dtype)
    x = torch.randn(tokens, sizes[-1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    got = error(lookahead(x, chain, block=block), x, chain)
    # float32: scale and bias are that in the float64 chain too; bfloat16: a state rounded to it gives 1.4e-2
    assert got < {torch.float64: 1e-6, torch.float32: 3e-6, torch.bfloat16: 6e-3}[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("coupling", [1, 3])
@pytest.mark.parametrize(("depth", "rank"), [(12, 192), (36, 64)])
def test_the_limit_of_16_bits_is_met_and_a_rounded_state_breaks_it(
    depth: int, rank: int, coupling: int, dtype: torch.dtype
) -> None:
    chain, x = drawn(1, depth, rank, 576, dtype), torch.randn(64, 576)
    chain = chain._replace(B=chain.B * coupling)
    for steps in (2, 4, depth):
        assert error(lookahead(x, chain, block=steps * rank), x, chain) < limit(x, chain)
    assert error(rounded_state(x, chain), x, chain) > limit(x, chain)
    assert limit(x, chain) < 1.3 * error(chain_reference(x, chain), x, chain)  # which rounds P, too


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_every_activation(act: str) -> None:
    chain, x = drawn(2, 5, 16, 48, act=act), torch.randn(6, 48)
    chain = chain._replace(B=chain.B / 2)
    # Squares make a float32 chain's own error large.
    naive = error(chain_reference(x, chain), x, chain)
    assert error(lookahead(x, chain, block=48), x, chain) < max(3e-6, 2 * naive)


def test_any_leading_shape_and_dtype_of_x() -> None:
    chain = drawn(1, 5, 16, 48, torch.bfloat16)
    x = torch.randn(2, 3, 48).to(torch.bfloat16)
    y = lookahead(x, chain)
    assert y.shape == x.shape and y.dtype == torch.bfloat16
    assert torch.equal(y[1], lookahead(x[1], chain)) or error(y[1], x[1], chain) < 5e-3
    assert lookahead(x[:0], chain).shape == (0, 3, 48)


def test_gram_blocks_hold_what_steps_add_to_later_ones_and_nothing_else() -> None:
    chain = drawn(2, 5, 16, 48)
    gram = gram_blocks(chain.A, chain.B, block=48)
    wanted = torch.zeros(2, 2, 48, 16)  # the last block has two steps
    for n, tile, j, i in ((0, 0, 0, 1), (0, 1, 0, 2), (0, 2, 1, 2), (1, 0, 3, 4)):
        wanted[:, n, 16 * tile : 16 * (tile + 1)] = chain.B[:, j] @ chain.A[:, i].mT
    torch.testing.assert_close(gram, wanted)


@pytest.mark.parametrize("broken", ["zeroed", "transposed", "shifted"])
def test_a_wrong_gram_block_is_seen(broken: str) -> None:
    chain, x = drawn(1, 8, 16, 64), torch.randn(4, 64)
    gram = gram_blocks(chain.A, chain.B, block=64)
    assert error(lookahead(x, chain, gram=gram), x, chain) < 3e-6
    tile = gram[0, 1, 32:48]  # what step 1 adds to step 2
    if broken == "shifted":
        gram = gram.roll(1, 1)
    else:
        tile.copy_(torch.zeros_like(tile) if broken == "zeroed" else tile.T.clone())
    assert error(lookahead(x, chain, gram=gram), x, chain) > 1e-3


def test_a_token_of_nan_stays_alone() -> None:
    chain, x = drawn(2, 6, 16, 48), torch.randn(5, 48)
    spoiled = x.clone()
    spoiled[2, 7] = float("nan")
    y, z = (lookahead(t, chain, block=48) for t in (x, spoiled))
    assert z[2].isnan().all() and torch.equal(y[[0, 1, 3, 4]], z[[0, 1, 3, 4]])


def test_what_does_not_fit_is_named() -> None:
    chain = drawn(1, 6, 16, 48)
    with pytest.raises(ValueError, match="47 features do not fit a chain of 48"):
        lookahead(torch.randn(3, 47), chain)
    for shape in ((1, 4, 16, 16), (1, 3, 16, 48), (2, 3, 16, 16), (1, 3, 32, 16), (3, 16, 16)):
        with pytest.raises(ValueError, match=r"Gram blocks of shape .*\(1, 6, 16, 48\)"):
            lookahead(torch.randn(3, 48), chain, gram=torch.zeros(shape))
    with pytest.raises(ValueError, match="plain steps only"):
        lookahead(torch.randn(3, 48), chain._replace(G=chain.A))


def test_blocks_of_one_step_take_no_memory() -> None:
    chain, x = drawn(2, 5, 48, 64), torch.randn(6, 64)
    gram = gram_blocks(chain.A, chain.B, block=64)
    assert gram.shape == (2, 5, 0, 48) and gram.nbytes == 0
    assert error(lookahead(x, chain, gram=gram), x, chain) < 3e-6
    with pytest.raises(ValueError, match="Gram blocks of shape"):
        lookahead(x, chain, gram=torch.zeros(2, 5, 48, 48))


def test_a_block_of_narrow_steps_is_what_one_solve_takes() -> None:
    for rank, steps in ((16, 16), (32, 16), (64, 8), (96, 5), (128, 4), (144, 40)):
        assert block_steps(10**6, 40, rank) == steps
