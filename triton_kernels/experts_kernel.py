"""Experts' chains on a GPU: one launch, in which a program leads one tile of one expert's tokens through all steps.

The statement in plain torch is `experts_reference`. The states z are float32 in memory, and each program's own: what it
writes in one half of a step it alone reads in the next, so that nothing but its threads waits. The programs of an
expert's tiles find their place from `ends` by themselves, so that the host waits for no counts: a grid of as many
programs as there may be tiles, of which those left over end at once.

Of tiles of 16 and 64 tokens, 32 and 64 columns, 4 and 8 warps and 1 to 3 stages, 8 warps with 3 stages and 32 columns
alone spill nothing on sm_80 and sm_90. Simple before fast: weights are read once a tile of tokens, and few tokens make
few programs. Not timed on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import triton_form
from .device import EXACT
from .experts import ExpertChains

_ROWS = 16  # tokens of a tile, at the least: with top-k of E experts a batch leaves each few
_MOST_ROWS = 64


def run_experts(x: Tensor, ends: Tensor, chains: ExpertChains) -> Tensor:
    """y [S, d] in x's dtype, for x [S, d] on a GPU and chains that were checked; see `experts_reference`."""
    A, B = chains.A.contiguous(), chains.B.contiguous()
    scale, bias = (vector.float().contiguous() for vector in (chains.scale, chains.bias))
    experts, steps, rank, d = A.shape
    x = x.contiguous()
    y = torch.zeros_like(x)
    if len(x) == 0:
        return y
    z = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    h = torch.empty(len(x), rank, dtype=A.dtype, device=x.device)
    rows = max(_ROWS, min(_MOST_ROWS, triton.next_power_of_2(triton.cdiv(len(x), experts))))
    tiles = triton.cdiv(len(x), rows) + experts  # each expert's last tile may be part of one
    experts_kernel[(tiles,)](
        x, ends.int(), A, B, scale, bias, z, h, y, len(x), d, experts, steps, rank,
        EP=max(16, triton.next_power_of_2(experts)), BT=rows, BR=16 if rank % 32 or A.dtype == torch.float32 else 32,
        BD=32, ACT=triton_form(chains.act), num_warps=8, num_stages=3,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["S", "d", "E", "K", "r"])
def experts_kernel(
    p_x, p_ends, p_A, p_B, p_scale, p_bias, p_z, p_h, p_y, S, d, E, K, r,
    EP: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    # Which expert's which tile this is: experts whose tiles all lie before it, counted.
    i = tl.program_id(0)
    o_e = tl.arange(0, EP)
    ends = tl.minimum(tl.load(p_ends + o_e, mask=o_e < E, other=0), S)
    begins = tl.minimum(tl.load(p_ends + o_e - 1, mask=(o_e > 0) & (o_e < E), other=0), S)
    tiles = tl.where(o_e < E, (tl.maximum(ends - begins, 0) + BT - 1) // BT, 0)
    last = tl.cumsum(tiles, 0)
    e = tl.sum((last <= i).to(tl.int32), 0)
    if e >= E:
        return
    here = o_e == e
    first = tl.sum(tl.where(here, begins + (i - last + tiles) * BT, 0), 0)
    end = tl.sum(tl.where(here, ends, 0), 0)
    o_t = (first + tl.arange(0, BT)).to(tl.int64)
    m_t = o_t < end
    o_r, o_d = tl.arange(0, BR), tl.arange(0, BD)
    p_A += e.to(tl.int64) * K * r * d
    p_B += e.to(tl.int64) * K * r * d
    for c in range(0, d, BD):
        m = m_t[:, None] & (c + o_d < d)[None, :]
        at = o_t[:, None] * d + (c + o_d)[None, :]
        tl.store(p_z + at, tl.load(p_x + at, mask=m, other=0.0).to(tl.float32), mask=m)
    tl.debug_barrier()
    for _ in range(K):
        for b in range(0, r, BR):
            read = tl.zeros((BT, BR), tl.float32)
            for c in range(0, d, BD):
                m_d = c + o_d < d
                z = tl.load(
                    p_z + o_t[:, None] * d + (c + o_d)[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0
                )
                A = tl.load(p_A + (b + o_r)[None, :] * d + (c + o_d)[:, None], mask=m_d[:, None], other=0.0)
                read = tl.dot(z.to(A.dtype), A, read, input_precision=EXACT)
            tl.store(
                p_h + o_t[:, None] * r + (b + o_r)[None, :],
                ACT(read).to(p_h.dtype.element_ty),
                mask=m_t[:, None],
            )
        tl.debug_barrier()  # h is written by other threads than read it
        for c in range(0, d, BD):
            m_d = c + o_d < d
            m = m_t[:, None] & m_d[None, :]
            at = o_t[:, None] * d + (c + o_d)[None, :]
            z = tl.load(p_z + at, mask=m, other=0.0)
            for b in range(0, r, BR):
                h = tl.load(p_h + o_t[:, None] * r + (b + o_r)[None, :], mask=m_t[:, None], other=0.0)
                B = tl.load(p_B + (b + o_r)[:, None] * d + (c + o_d)[None, :], mask=m_d[None, :], other=0.0)
                z = tl.dot(h, B, z, input_precision=EXACT)
            tl.store(p_z + at, z, mask=m)
        tl.debug_barrier()
        p_A += r * d
        p_B += r * d
    for c in range(0, d, BD):
        m_d = c + o_d < d
        m = m_t[:, None] & m_d[None, :]
        at = o_t[:, None] * d + (c + o_d)[None, :]
        moved = tl.load(p_z + at, mask=m, other=0.0) - tl.load(p_x + at, mask=m, other=0.0).to(tl.float32)
        scale = tl.load(p_scale + e * d + c + o_d, mask=m_d, other=0.0)
        bias = tl.load(p_bias + e * d + c + o_d, mask=m_d, other=0.0)
        tl.store(p_y + at, (scale[None, :] * moved + bias[None, :]).to(p_y.dtype.element_ty), mask=m)
