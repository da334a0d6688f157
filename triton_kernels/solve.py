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
from .decode_plan import padded_rank
from .device import EXACT, strides


def block_solve(
    P: Tensor,
    gram: Tensor,
    rank: int,
    act: str,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """H of a block of steps from what all of them read of its first state.

    Args:
        P: [L, T, m], float32, rows contiguous.
        gram: The block's [L, m, m], as `gram_blocks` makes it, rows contiguous.
        rank: Columns of a step, which divide m.
        act: One of KERNEL_ACTS.
        out: Where H is written, [L, T, m], rows contiguous; new memory if None.

    Returns:
        H, [L, T, m], in gram's dtype.
    """
    lanes, tokens, width = P.shape
    H = torch.empty(P.shape, dtype=gram.dtype, device=P.device) if out is None else out
    steps = width // rank
    tile = solve_tile(tokens, steps, rank, gram.dtype)
    block_solve_kernel[(triton.cdiv(tokens, tile["BM"]), lanes)](
        P, gram, H,
        tokens,
        *strides(P), *strides(gram), *strides(H),
        S=steps, R=rank, RP=padded_rank(rank),
        ACT=triton_form(act), **tile,
    )  # fmt: skip
    return H


def solve_tile(tokens: int, steps: int, rank: int, dtype: torch.dtype) -> dict[str, int]:
    """Tokens of a program (BM), columns of a tile (BC) and launch options.

    With 16-bit weights no register spills, on sm_80, sm_90, sm_100 and gfx942, up to m = 512. Without matrix units,
    float32 on NVIDIA, all tiles spill: small ones the least.
    """
    BM = max(16, triton.next_power_of_2(tokens))
    BC = padded_rank(rank) * triton.next_power_of_2(steps)
    if dtype == torch.float32:  # m = 256, rank 16: 6 s to compile; with the tiles below 90 s
        return {"BM": 16, "BC": min(32, BC), "num_warps": 4}
    # Rank 16 needs more registers than the others: of m = 512, with 4 warps, it spills 64 bytes on sm_80.
    # 64 tokens are what a Hopper matrix unit wants.
    return {"BM": min(64, BM), "BC": min(64, BC), "num_warps": 8 if steps * rank > 256 and rank <= 16 else 4}


@triton.jit
def block_solve_kernel(
    p_p, p_gram, p_h,
    T,
    s_pl, s_pt, s_gl, s_gj, s_hl, s_ht,
    S: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    ACT: tl.constexpr,
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
    p_p += lane * s_pl + o_t[:, None] * s_pt + o_m[None, :]
    p_h += lane * s_hl + o_t[:, None] * s_ht + o_m[None, :]
    p_gram += lane * s_gl + o_m[:, None] * s_gj + o_m[None, :]
    hs = ()
    for i in tl.static_range((S + GROUP - 1) // GROUP * PARTS):
        start = i // PARTS * GROUP * R + i % PARTS * BC
        m_i = columns_exist(i, S, R, RP, BC)
        p = tl.load(p_p + start, mask=m_t & m_i[None, :], other=0.0)
        for j in tl.static_range(i // PARTS * PARTS):
            before = j // PARTS * GROUP * R + j % PARTS * BC
            m_gram = columns_exist(j, S, R, RP, BC)[:, None] & m_i[None, :]
            gram = tl.load(p_gram + before * s_gj + start, mask=m_gram, other=0.0)
            p = tl.dot(hs[j], gram, p, input_precision=EXACT)
        if GROUP > 1:
            m_gram = (o_s[:, None] < o_s[None, :]) & m_i[:, None] & m_i[None, :]
            gram = tl.load(p_gram + start * s_gj + start, mask=m_gram, other=0.0)
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
