"""The products of a round: P = z A^T, or H = act(z A^T), and u += H B with what follows from it in the same launch.

One kernel, because both are products of 16-bit operands summed in float32, and what surrounds the second one is
memory traffic: reading u, adding, writing u and the next round's operand x + u in one pass costs 12 bytes an
element of the state; torch's product, addition and cast cost 24.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import triton_form
from .device import EXACT, strides


def matmul(
    a: Tensor,
    W: Tensor,
    out: Tensor,
    *,
    total: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    finish: tuple[Tensor, Tensor] | None = None,
    act: str | None = None,
) -> None:
    """Writes out = act(total + a W) of every lane, summed in float32.

    Args:
        a: [L, T, n], of any float dtype; its lanes may share memory.
        W: [L, n, k], either of its last two dimensions contiguous. Products take a in its dtype.
        out: [L, T, k], of any float dtype, rows contiguous.
        total: [L, T, k], float32; may be `out`; None for zeros.
        state: x [T, k] and z [L, T, k], of which z = x + total + a W is written too, in z's dtype.
        finish: scale and bias [k], float32, for out = scale * (total + a W) + bias.
        act: One of KERNEL_ACTS, None for none.
    """
    lanes, tokens, inner = a.shape
    columns = W.shape[2]
    x, z = state or (None, None)
    scale, bias = finish or (None, None)
    tile = tiles(tokens, columns, W.dtype)
    grid = (triton.cdiv(tokens, tile["BM"]) * triton.cdiv(columns, tile["BN"]), lanes)
    matmul_kernel[grid](
        a, W, total, out, x, z, scale, bias,
        tokens, columns, inner,
        *a.stride(), *W.stride(), *strides(total), *strides(out), *strides(z), 0 if x is None else x.stride(0),
        TOTAL=total is not None, STATE=state is not None, FINISH=finish is not None,
        ACT=None if act is None else triton_form(act), **tile,
    )  # fmt: skip


def tiles(tokens: int, columns: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options that do not spill on sm_80, sm_90, sm_100 and gfx942."""
    # 128 by 256 would read less, but spills 700 bytes a thread where u is added and z written, and a product of one
    # block, 512 columns for 4096 tokens, has 64 such tiles for 132 multiprocessors.
    BM = min(128, max(16, triton.next_power_of_2(tokens)))
    if dtype == torch.float32:  # no matrix units: small tiles
        return {"BM": min(BM, 64), "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
    BN = min(128, max(16, triton.next_power_of_2(columns)))
    return {"BM": BM, "BN": BN, "BK": 64, "num_warps": 8 if BM == 128 else 4, "num_stages": 3}


@triton.jit
def matmul_kernel(
    p_a, p_w, p_total, p_out, p_x, p_z, p_scale, p_bias,
    T, N, K,
    s_al, s_at, s_ak, s_wl, s_wk, s_wn, s_sl, s_st, s_ol, s_ot, s_zl, s_zt, s_xt,
    TOTAL: tl.constexpr, STATE: tl.constexpr, FINISH: tl.constexpr, ACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(1).to(tl.int64)
    # Tiles that run at the same time share rows of a: 8 rows of tiles at a time, column by column.
    rows, columns = tl.cdiv(T, BM), tl.cdiv(N, BN)
    group = tl.program_id(0) // (8 * columns)
    height = min(rows - group * 8, 8)
    i_m = group * 8 + tl.program_id(0) % (8 * columns) % height
    i_n = tl.program_id(0) % (8 * columns) // height
    o_t = (i_m * BM + tl.arange(0, BM)).to(tl.int64)
    o_n = (i_n * BN + tl.arange(0, BN)).to(tl.int64)
    o_k = tl.arange(0, BK)
    m_t, m_n = o_t < T, o_n < N
    p_a += lane * s_al + o_t[:, None] * s_at + o_k[None, :] * s_ak
    p_w += lane * s_wl + o_k[:, None] * s_wk + o_n[None, :] * s_wn
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(0, K, BK):
        m_k = o_k < K - k
        a = tl.load(p_a, mask=m_t[:, None] & m_k[None, :], other=0.0)
        w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
        acc = tl.dot(a.to(w.dtype), w, acc, input_precision=EXACT)
        p_a += BK * s_ak
        p_w += BK * s_wk
    m_tile = m_t[:, None] & m_n[None, :]
    if TOTAL:
        acc += tl.load(p_total + lane * s_sl + o_t[:, None] * s_st + o_n[None, :], mask=m_tile, other=0.0)
    if STATE:
        x = tl.load(p_x + o_t[:, None] * s_xt + o_n[None, :], mask=m_tile, other=0.0).to(tl.float32)
        tl.store(p_z + lane * s_zl + o_t[:, None] * s_zt + o_n[None, :], x + acc, mask=m_tile)
    if FINISH:
        scale = tl.load(p_scale + o_n, mask=m_n, other=0.0)
        bias = tl.load(p_bias + o_n, mask=m_n, other=0.0)
        acc = acc * scale[None, :] + bias[None, :]
    if ACT is not None:
        acc = ACT(acc)
    tl.store(p_out + lane * s_ol + o_t[:, None] * s_ot + o_n[None, :], acc, mask=m_tile)
