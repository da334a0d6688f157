"""The block solve: from P [T, m] to H [T, m], a chain of small dependent products kept on chip.

For a block of S steps of rank r (m = S * r) that starts at state Z, with P = Z A^T for all its rows:

    h_i = act(p_i + sum_{j<i} h_j gram[j, i])        gram[j, i] = B_j A_i^T, r x r

The program of a tile of tokens keeps all h of the block in registers, in the dtype of the weights, as tiles of 64
columns at most, and takes p and the Gram tiles as they come. A tile is a group of steps of small rank, or a part of
a step of large rank. Small steps in groups, because a program of a product per pair of steps takes minutes to
compile (rank 16, m = 512, sm_80: over 5; in groups 7 s): a tile takes what earlier tiles add in a product each,
then its own steps one by one, each adding to the tile what it means for the later ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import triton_form
from .device import EXACT
from .launch import Launch


class Solve:
    """The launches of the solve of a block of every lane."""

    def __init__(
        self,
        *,
        lanes: int,
        steps: int,
        rank: int,
        block: int,
        blocks: int,
        tokens: int,
        dtype: torch.dtype,
        act: str,
    ) -> None:
        """Args:
        lanes: L.
        steps: Of the block that is solved: those of the last one may be fewer.
        rank: Columns of a step.
        block: Steps of a Gram block, and of a token's lane in P and H.
        blocks: Gram blocks of a lane.
        tokens: About how many of a call, by which tiles are chosen.
        dtype: Of the weights.
        act: One of KERNEL_ACTS.
        """
        self._lanes = lanes
        width, size = block * rank, block * (block - 1) // 2 * rank**2
        tile = solve_tile(tokens, steps, rank, dtype)
        self._rows = tile["BM"]
        warps = tile.pop("num_warps")
        constants = {
            "S": steps, "R": rank, "RP": padded_rank(rank), "ACT": triton_form(act), **tile,
            "ROW": lanes * width, "LANE": width, "G_BLOCK": size, "G_LANE": blocks * size,
        }  # fmt: skip
        self._launch = Launch(block_solve_kernel, constants, num_warps=warps)

    def __call__(self, tokens: int, block: int, P: Tensor, gram: Tensor, H: Tensor) -> None:
        """Writes H of the block.

        Args:
            tokens: T.
            block: Which Gram block.
            P: [T, L, m], float32, m being the columns of a Gram block.
            gram: What `gram_blocks` gave.
            H: [T, L, m], in gram's dtype.
        """
        grid = (-(-tokens // self._rows), self._lanes, 1)
        self._launch(grid, P, gram, H, tokens, block)


def padded_rank(rank: int) -> int:
    """The rank as a solve holds it: a power of two of at least 16, which is what `tl.dot` takes."""
    return max(16, 1 << (rank - 1).bit_length())


def solve_tile(tokens: int, steps: int, rank: int, dtype: torch.dtype) -> dict[str, int]:
    """Tokens of a program (BM), columns of a tile (BC) and warps.

    With 16-bit weights no register spills, on sm_80, sm_90, sm_100 and gfx942, up to m = 512. Without matrix units,
    float32 on NVIDIA, all tiles spill: small ones the least.
    """
    BM = max(16, 1 << (tokens - 1).bit_length())
    BC = padded_rank(rank) << (steps - 1).bit_length()
    if dtype == torch.float32:  # m = 256, rank 16: 6 s to compile; with the tiles below 90 s
        return {"BM": 16, "BC": min(32, BC), "num_warps": 4}
    # Rank 16 needs more registers than the others: of m = 512, with 4 warps, it spills 64 bytes on sm_80.
    # 64 tokens are what a Hopper matrix unit wants.
    return {"BM": min(64, BM), "BC": min(64, BC), "num_warps": 8 if steps * rank > 256 and rank <= 16 else 4}


@triton.jit(do_not_specialize=["T", "block"])
def block_solve_kernel(
    p_p, p_gram, p_h, T, block,
    S: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, ACT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    ROW: tl.constexpr, LANE: tl.constexpr, G_BLOCK: tl.constexpr, G_LANE: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(1).to(tl.int64)
    o_t = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    # A tile's columns are GROUP steps (of RP columns each), or one of the PARTS of a step. Everything that is a
    # tensor is the same for all tiles: what differs between them is added to pointers as a number.
    GROUP: tl.constexpr = BC // RP if BC > RP else 1
    PARTS: tl.constexpr = RP // BC if RP > BC else 1
    o_c = tl.arange(0, BC)
    o_s = o_c // RP
    o_m = o_c if GROUP == 1 or R == RP else o_s * R + o_c % RP
    m_t = o_t[:, None] < T
    o_p = lane * LANE + o_t[:, None] * ROW + o_m[None, :]
    p_p += o_p
    p_h += o_p
    # Step s has the rows from s (s - 1) / 2 R on, and s = first + o_s: what is its own of that, and what with the tile.
    o_gram = o_m[:, None] * R + (o_s * (o_s - 1) // 2 * (R * R) + o_m - o_s * R)[None, :]
    p_gram += lane * G_LANE + block.to(tl.int64) * G_BLOCK + o_gram
    hs = ()
    for i in tl.static_range((S + GROUP - 1) // GROUP * PARTS):
        first = i // PARTS * GROUP  # step
        start = first * R + i % PARTS * BC
        p_i = p_gram + (first * (first - 1) // 2 * (R * R) + i % PARTS * BC)
        if GROUP > 1:
            p_i += (o_s * (first * R * R))[None, :]
        m_i = columns_exist(i, S, R, RP, BC)
        p = tl.load(p_p + start, mask=m_t & m_i[None, :], other=0.0)
        for j in tl.static_range(i // PARTS * PARTS):
            before = j // PARTS * GROUP * R + j % PARTS * BC
            m_gram = columns_exist(j, S, R, RP, BC)[:, None] & m_i[None, :]
            gram = tl.load(p_i + before * R, mask=m_gram, other=0.0)
            p = tl.dot(hs[j], gram, p, input_precision=EXACT)
        if GROUP > 1:
            m_gram = (o_s[:, None] < o_s[None, :]) & m_i[:, None] & m_i[None, :]
            gram = tl.load(p_i + first * (R * R), mask=m_gram, other=0.0)
            for s in tl.static_range(min(GROUP, S - i * GROUP) - 1):
                h = ACT(p).to(p_h.dtype.element_ty)
                own = tl.where(o_s[None, :] == s, h, 0.0)
                p = tl.dot(own, gram, p, input_precision=EXACT)
        # Padding columns are not zero for every activation (sigmoid), and a masked Gram row is: 0 * 0.5.
        h = ACT(p).to(p_h.dtype.element_ty)
        tl.store(p_h + start, h, mask=m_t & m_i[None, :])
        hs = hs + (h,)


@triton.jit
def columns_exist(i: tl.constexpr, S: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BC: tl.constexpr):
    """Which columns of tile i are no padding, of the rank or after the last step."""
    o_c = i * BC + tl.arange(0, BC)
    return (o_c // RP < S) & (o_c % RP < R)
