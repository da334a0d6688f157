"""Prefill against a float64 chain, on the GPU if there is one, else in Triton's interpreter; and its products."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_chains import drawn, error, limit, rounded_state
from torch import Tensor

from dlr_lock.triton_kernels import ChainWeights, gram_blocks
from dlr_lock.triton_kernels.gpu import H200
from dlr_lock.triton_kernels.lookahead import block_steps, gram_steps, own_tiles
from dlr_lock.triton_kernels.matmul import Product, View, matmul_memory
from dlr_lock.triton_kernels.prefill import prefill
from dlr_lock.triton_kernels.rounds import Shape, chunk_tokens
from dlr_lock.triton_kernels.tiles import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Execute = Callable[..., Any]


def run(x: Tensor, chain: ChainWeights, block: int, scratch: int, broken: bool = False) -> Tensor:
    x, chain = x.to(DEVICE), chain.to(DEVICE)
    gram = gram_blocks(chain.A, chain.B, block=block)
    if broken:
        own_tiles(gram, gram_steps(gram) - 1)[:, 0, : chain.A.shape[2]] = (
            0  # what the last step reads of the first
        )
    return prefill(x, chain, gram, H200, scratch=scratch).cpu()


@pytest.mark.parametrize(
    ("lanes", "depth", "rank", "hidden", "tokens", "block", "act"),
    [
        (1, 6, 16, 96, 40, 32, "silu"),  # rounds of two steps
        (3, 7, 16, 96, 5, 48, "gelu"),  # a ragged last one, lanes that are summed
        (2, 4, 48, 80, 70, 512, "relu"),  # one round; a rank that is no power of two
        (1, 4, 16, 64, 1, 512, "silu"),
        (1, 5, 16, 33, 300, 32, "silu"),  # chunks, the last one ragged; odd features
        (2, 20, 16, 32, 7, 512, "silu"),  # a whole solve of 16 steps, and a ragged one
        (2, 3, 336, 32, 7, 1024, "silu"),  # wide steps, all in one round
        (1, 7, 144, 48, 7, 432, "gelu"),  # three a round, the last one alone
        (2, 5, 192, 48, 20, 400, "silu"),  # two
        (2, 4, 48, 80, 70, 48, "gelu"),  # blocks of one step: the activation follows the product
        (3, 1, 32, 64, 9, 512, "relu"),  # a single step, as an MLP is
    ],
)
def test_is_the_chain(
    execute: Execute,
    lanes: int,
    depth: int,
    rank: int,
    hidden: int,
    tokens: int,
    block: int,
    act: str,
) -> None:
    chain, x = drawn(lanes, depth, rank, hidden, act=act), torch.randn(tokens, hidden)
    y = execute(run, x, chain, block, 1)  # no scratch: chunks of 128 tokens
    assert y.shape == x.shape and error(y, x, chain) < 1e-6
    if block_steps(block, depth, rank) > 1:  # a block of one step has no Gram matrix to break
        assert error(execute(run, x, chain, block, 1, True), x, chain) > 1e-4


@pytest.mark.parametrize("block", [1, 64, 288])
def test_in_16_bits_the_state_and_all_sums_are_float32(execute: Execute, block: int) -> None:
    """With float16, of which the interpreter makes no garbage."""
    rank = 144 if block == 288 else 32  # two wide steps a round; two that are solved; one
    chain, x = drawn(1, 12, rank, 96, torch.float16), torch.randn(64, 96)
    y = execute(run, x, chain, block, 2**20)
    assert error(y, x, chain) < limit(x, chain) < error(rounded_state(x, chain), x, chain)


def test_a_token_of_nan_stays_alone(execute: Execute) -> None:
    chain, x = drawn(2, 6, 16, 48), torch.randn(70, 48)
    clean = execute(run, x, chain, 48, 2**20)
    x[37, 5] = torch.nan
    y = execute(run, x, chain, 48, 2**20)
    assert y[37].isnan().all()
    y[37] = clean[37]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("shape", [(1, 64, 336, 4096), (64, 12, 32, 4096), (1, 36, 64, 576)])
def test_scratch_stays_under_its_bound(shape: tuple[int, ...]) -> None:
    lanes, _, _, hidden = shape
    tokens = chunk_tokens(Shape(*shape, tokens=1), 512)
    assert tokens % 128 == 0
    assert lanes * tokens * (hidden * (4 + 2) + 512 * (4 + 2)) <= 256 * 2**20


def one_product(a: Tensor, W: Tensor, total: Tensor, tile: Tile) -> list[Tensor]:
    """total + a W from column 40 on, and relu of it before, NaN elsewhere: twice; and what is left of the turns."""
    (tokens, inner), size = a.shape, W.shape[1]
    product = Product(
        lanes=1, columns=size, inner=inner, tile=tile, a=View(inner), w=View(size), out=View(size), total=True,
        active=40, act="relu",
    )  # fmt: skip
    a, W, total = a.to(DEVICE), W.to(DEVICE), total.to(DEVICE)
    memory = matmul_memory([product], tokens, a.device)
    outs = [torch.full((2, *total.shape), torch.nan, device=DEVICE) for _ in range(2)]
    for out in outs:
        product(tokens, 0, a, W, out[0], hidden=out[1], total=total, **memory)
    return [t.cpu() for t in (*outs, memory.get("turns", torch.zeros(1)))]


@pytest.mark.parametrize("split", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [(16, 64), (128, 128), (64, 256)])  # ending whole, in four and in eight
def test_a_product_in_parts_and_its_columns(execute: Execute, size: tuple[int, int], split: int) -> None:
    """The same bits every time; ragged tiles, and at 7 a part that has nothing."""
    a, W, total = torch.randn(150, 100), torch.randn(100, 200), torch.randn(150, 200)
    first, second, turns = execute(one_product, a, W, total, Tile(*size, 16, split=split))
    wanted = total.double() + a.double() @ W.double()
    assert first[0, :, :40].isnan().all() and first[1, :, 40:].isnan().all()
    got = torch.cat([first[1, :, :40], first[0, :, 40:]], 1)
    wanted[:, :40] = wanted[:, :40].relu()
    assert (got - wanted).norm() / wanted.norm() < 1e-6
    assert torch.equal(first.nan_to_num(), second.nan_to_num()) and not turns.any()
