"""The block solve against float64, on the GPU if there is one, else in Triton's interpreter.

The interpreter computes bf16 wrongly; on a machine without a GPU the 16-bit path is tested in float16.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlr_lock.triton_kernels import ACTIVATIONS
from dlr_lock.triton_kernels.activations import KERNEL_ACTS
from dlr_lock.triton_kernels.solve import Solve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# RMS error over RMS. float32: 1.2e-7 measured; a Gram rounded to tf32 gives 4e-5 or more, to bf16 3e-4. With 16 bits
# both sides round every h, and differ where a sum in float32 falls on the other side of a tie: in float16 measured
# 1.5e-5, and 4e-4 where P is rounded as well; bf16's grid is 8 times coarser.
BOUNDS = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 5e-4}
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")

Block = tuple[Tensor, Tensor]
Execute = Callable[..., Tensor]


def solve(P: Tensor, gram: Tensor, rank: int, act: str) -> Tensor:
    lanes, tokens, width = P.shape
    solving = Solve(
        lanes=lanes, steps=width // rank, rank=rank, block=width // rank, blocks=2, tokens=tokens,
        dtype=gram.dtype, act=act,
    )  # fmt: skip
    P, gram = P.transpose(0, 1).contiguous().to(DEVICE), gram.contiguous().to(DEVICE)
    H = torch.full(P.shape, torch.nan, dtype=gram.dtype, device=DEVICE)
    solving(tokens, 1, P, gram, H)
    return H.transpose(0, 1).cpu()


def random_block(L: int, S: int, r: int, T: int, dtype: torch.dtype = torch.float32) -> Block:
    """P, a view into a larger tensor of NaN that no step may read, and two Gram blocks, the first of them NaN."""
    m = S * r
    room = torch.full((T + 1, L, m + 24), torch.nan)
    P = room[:T, :, 16 : 16 + m].transpose(0, 1)
    P.copy_(torch.randn(L, T, m))
    gram = torch.full((L, 2, S * (S - 1) // 2 * r, r), torch.nan, dtype=dtype)
    gram[:, 1] = 0.7 * torch.randn(gram[:, 1].shape) / m**0.5
    return P, gram


def tile_of(gram: Tensor, j: int, i: int) -> Tensor:
    """What step j adds to step i, [L, r, r]."""
    r, number = gram.shape[-1], i * (i - 1) // 2 + j
    return gram[:, 1, number * r : (number + 1) * r]


def by_hand(P: Tensor, gram: Tensor, rank: int, act: str) -> Tensor:
    """The formula in float64, with every h rounded to gram's dtype."""
    hs: list[Tensor] = []
    for i in range(P.shape[2] // rank):
        p = P[:, :, i * rank : (i + 1) * rank].double()
        for j, h in enumerate(hs):
            p = p + h @ tile_of(gram, j, i).double()
        hs.append(ACTIVATIONS[act](p).to(gram.dtype).double())
    return torch.cat(hs, 2)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("L", "S", "r", "T"),
    [
        (1, 1, 16, 1),
        (3, 6, 16, 17),
        (1, 5, 24, 9),
        (1, 5, 32, 64),
        (2, 4, 48, 33),
        (2, 3, 64, 130),
        (1, 3, 96, 20),
        (1, 2, 128, 70),
    ],
)
def test_the_formula(execute: Execute, L: int, S: int, r: int, T: int, dtype: torch.dtype) -> None:
    block = random_block(L, S, r, T, dtype)
    H = execute(solve, *block, r, "silu")
    assert H.dtype == dtype and H.shape == (L, T, S * r)
    assert error(H, by_hand(*block, r, "silu")) < BOUNDS[dtype]


@pytest.mark.parametrize("act", sorted(KERNEL_ACTS))
def test_every_activation_in_a_block(execute: Execute, act: str) -> None:
    block = random_block(2, 3, 16, 19)
    bound = 2 * BOUNDS[torch.float32]  # a square doubles relative errors
    assert error(execute(solve, *block, 16, act), by_hand(*block, 16, act)) < bound


@pytest.mark.parametrize(("r", "act"), [(16, "silu"), (48, "relu")])
def test_nan_stays_with_its_token(execute: Execute, r: int, act: str) -> None:
    block = random_block(2, 4, r, 70)
    clean = execute(solve, *block, r, act)
    assert torch.isfinite(clean).all()
    block[0][1, 37, r + 2] = torch.nan  # of step 1
    H = execute(solve, *block, r, act)
    assert H[1, 37, 2 * r :].isnan().all(), "steps that read a NaN have hidden it"
    H[1, 37] = clean[1, 37]
    assert torch.equal(H, clean)


@pytest.mark.parametrize("breakage", [torch.zeros_like, lambda tile: tile.mT.clone()], ids=["zero", "turned"])
def test_one_wrong_gram_tile_is_noticed(execute: Execute, breakage: Callable[[Tensor], Tensor]) -> None:
    r = 16
    block = random_block(1, 5, r, 40)
    wanted = by_hand(*block, r, "silu")
    tile = tile_of(block[1], 3, 4)  # the last step reads the one before
    tile.copy_(breakage(tile))
    assert error(execute(solve, *block, r, "silu"), wanted) > 1e4 * BOUNDS[torch.float32]
