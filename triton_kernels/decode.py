"""The decode kernels: a whole DLR-Net of one lane for up to 64 tokens, in one persistent cooperative launch.

Both read every weight once and keep the state in registers, and differ in how the CTAs divide a step:

    one token       CTA j has the columns of slice j of A and B, of all rows of the rank
                    P += z_j A_j^T, in L2;  wait for all;  z_j += act(P) B_j
    several tokens  CTA (i, j) has the rows of part i and the columns of group j
                    P_i += z_j A_ij^T;  wait for part i;  U_j += act(P_i) B_ij;  wait for group j;  z_j += U_j

The first needs one wait a step, and adds r values of each CTA; with more tokens that traffic would be the whole time
(132 times T r values a step, in L2), and the second adds d / (132 r) of it, for a wait more. One token needs no matrix
units, which would do 16 rows.

While a CTA waits the tiles of B and of the next A are on their way. `decode_plan.py` holds the geometry, and the
argument why nothing is read too early; `tests/triton_kernels/decode_steps.py` runs the schedules in plain torch, in any
order.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import triton_form
from .chain import ChainWeights
from .decode_plan import LINE, RING, DecodePlan
from .device import EXACT
from .launch import Launch


def decode(x: Tensor, chain: ChainWeights, plan: DecodePlan) -> Tensor:
    """The output of a DLR-Net of plain steps and one lane for few tokens.

    Args:
        x: The tokens, [T, d] with 1 <= T <= plan.tokens, of any float dtype, contiguous. All tensors begin at multiples
            of 16 bytes, as what torch allocates does.
        chain: The weights: A and B contiguous, float32, bfloat16 or float16; scale and bias float32; an activation of
            KERNEL_ACTS.
        plan: Who holds what, made for a chain of this shape: the launch fails where the device cannot run its CTAs at
            once.

    Returns:
        y, [T, d], in x's dtype, contiguous.
    """
    A, B, scale, bias, _, act = chain
    # Zeroed in a launch of its own, 1.2 us in a graph. Memory that is kept and left zero would save that, but not two
    # streams that use it at once, nor what graphs want back.
    memory = torch.zeros(plan.values + plan.counters, dtype=torch.float32, device=x.device)
    values, counters = memory[: plan.values], memory[plan.values :].view(torch.int32)
    y = torch.empty_like(x)
    launch = _launch(plan, act, x.dtype, A.dtype, x.device)
    launch((plan.ctas, 1, 1), x, A, B, scale, bias, y, values, counters, x.shape[0])
    return y


@lru_cache(maxsize=256)
def _launch(plan: DecodePlan, act: str, *_: object) -> Launch:
    """The launch, of its own for all else by which Triton would tell variants of the kernel apart: see `Launch`."""
    constants = {
        "K": plan.depth, "R": plan.rank, "D": plan.hidden, "ACT": triton_form(act),
        "RB": plan.rows, "DB": plan.columns, "WIDTH": plan.width, "TILES": plan.tiles, "HELD": plan.held,
        "GROUPS": plan.groups, "CTAS": plan.ctas, "AHEAD": plan.ahead,
    }  # fmt: skip
    if plan.tokens == 1:
        kernel = one_token_kernel
    else:
        kernel = tokens_kernel
        constants |= {"BM": plan.tokens, "PARTS": plan.parts, "RING": RING, "LINE": LINE}
    # All registers there are, for one CTA a multiprocessor: unasked, ptxas spills 8 to 16 bytes to make room for two.
    options = {"num_warps": plan.num_warps, "num_stages": 1, "maxnreg": 255, "launch_cooperative_grid": True}
    return Launch(kernel, constants, **options)


@triton.jit
def arrive(p_counter):
    # The release is one thread's. Before 3.9 Triton puts no bar.sync between the others' stores and it.
    tl.debug_barrier()
    tl.atomic_add(p_counter, 1, sem="release")


@triton.jit
def wait(p_counter, target):
    seen = tl.atomic_add(p_counter, 0, sem="acquire")  # a plain acquiring load in PTX
    while seen < target:
        seen = tl.atomic_add(p_counter, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _tile_down(
    p_w,
    start,
    left,
    more,
    t: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    RB: tl.constexpr,
    DB: tl.constexpr,
):
    """Of tiles [RB, DB] under one another, from `start` on, the t-th; zero but in R rows and `left` columns."""
    mask = (t * RB + tl.arange(0, RB)[:, None] < R) & (tl.arange(0, DB)[None, :] < left) & more
    return tl.load(p_w + (start + t * RB * D), mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _down(
    p_w,
    start,
    left,
    more,
    R: tl.constexpr,
    D: tl.constexpr,
    RB: tl.constexpr,
    DB: tl.constexpr,
    COUNT: tl.constexpr,
):
    tiles = ()
    for t in tl.static_range(COUNT):
        tiles += (_tile_down(p_w, start, left, more, t, R, D, RB, DB),)
    return tiles


@triton.jit
def _tile_along(p_w, start, rows, left, more, t: tl.constexpr, RB: tl.constexpr, DB: tl.constexpr):
    """Of tiles [RB, DB] beside one another, from `start` on, the t-th; zero but in `rows` rows and `left` columns."""
    mask = (tl.arange(0, RB)[:, None] < rows) & (t * DB + tl.arange(0, DB)[None, :] < left) & more
    return tl.load(p_w + (start + t * DB), mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _along(p_w, start, rows, left, more, RB: tl.constexpr, DB: tl.constexpr, COUNT: tl.constexpr):
    tiles = ()
    for t in tl.static_range(COUNT):
        tiles += (_tile_along(p_w, start, rows, left, more, t, RB, DB),)
    return tiles


@triton.jit
def _ask_ahead(p_a, p_b, k, CTAS: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr):
    """Asks for this CTA's share of B of step k + 1 and of A of step k + 2, whole cache lines, from memory into L2.

    Memory then streams on while all CTAs wait. STEP: elements of a matrix of a step.
    """
    PER: tl.constexpr = 1024 // p_a.dtype.element_ty.primitive_bitwidth  # elements of a line of 128 bytes
    SHARE: tl.constexpr = (STEP + CTAS * PER - 1) // (CTAS * PER)  # lines
    o = tl.minimum(tl.arange(0, triton.next_power_of_2(SHARE)), SHARE - 1)
    o = tl.minimum((tl.program_id(0) * SHARE + o) * PER, STEP - 1)
    for i in tl.static_range(2):
        p_w = p_b if i == 0 else p_a
        line = (p_w + (tl.minimum(k + 1 + i, K - 1) * STEP + o)).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit(do_not_specialize=["T"])
def one_token_kernel(
    p_x, p_a, p_b, p_scale, p_bias, p_y, p_sums, p_counter, T,
    K: tl.constexpr, R: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr, RB: tl.constexpr, DB: tl.constexpr,
    WIDTH: tl.constexpr, TILES: tl.constexpr, HELD: tl.constexpr, GROUPS: tl.constexpr,
    CTAS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """p_sums: P [K, R] float32, zero; p_counter: one int32, zero. T is 1."""
    first = tl.program_id(0) * WIDTH
    left = tl.minimum(WIDTH, D - first)
    o_r, o_c = tl.arange(0, RB), tl.arange(0, DB)
    m_c = o_c < left
    o_w = first + o_r[:, None] * D + o_c[None, :]
    p_all_a, p_all_b = p_a, p_b
    p_a += o_w
    p_b += o_w
    x = tl.load(p_x + first + o_c, mask=m_c, other=0.0).to(tl.float32)
    z = x
    ws = _down(p_a, 0, left, True, R, D, RB, DB, HELD)
    for k in range(K):
        o_k = k * (R * D)
        for t in tl.static_range(TILES):
            w = ws[t] if t < HELD else _tile_down(p_a, o_k, left, True, t, R, D, RB, DB)
            p = tl.sum(w.to(tl.float32) * z[None, :], 1)
            tl.atomic_add(p_sums + k * R + t * RB + o_r, p, mask=t * RB + o_r < R, sem="relaxed")
        arrive(p_counter)
        # Requested after the arrival, whose release would wait for loads before it.
        bs = _down(p_b, o_k, left, True, R, D, RB, DB, HELD)
        ws = _down(p_a, o_k + R * D, left, k + 1 < K, R, D, RB, DB, HELD)
        if AHEAD:
            _ask_ahead(p_all_a, p_all_b, k, CTAS, K, R * D)
        wait(p_counter, (k + 1) * GROUPS)
        update = tl.zeros((RB, DB), tl.float32)
        for t in tl.static_range(TILES):
            b = bs[t] if t < HELD else _tile_down(p_b, o_k, left, True, t, R, D, RB, DB)
            # L1 is not coherent, hence .cg. Rows that do not exist are zero in b.
            p = tl.load(p_sums + k * R + t * RB + o_r, mask=t * RB + o_r < R, other=0.0, cache_modifier=".cg")
            update += ACT(p)[:, None] * b.to(tl.float32)
        z += tl.sum(update, 0)
    scale = tl.load(p_scale + first + o_c, mask=m_c, other=0.0)
    bias = tl.load(p_bias + first + o_c, mask=m_c, other=0.0)
    tl.store(p_y + first + o_c, ((z - x) * scale + bias).to(p_y.dtype.element_ty), mask=m_c)


@triton.jit
def _zero_share(p_values, i, OF: tl.constexpr, SIZE: tl.constexpr):
    """Zeroes the i-th of OF shares of SIZE values."""
    SHARE: tl.constexpr = (SIZE + OF - 1) // OF
    BLOCK: tl.constexpr = triton.next_power_of_2(SHARE)
    o = tl.arange(0, BLOCK)
    tl.store(
        p_values + i * SHARE + o, tl.zeros((BLOCK,), tl.float32), mask=(o < SHARE) & (i * SHARE + o < SIZE)
    )


@triton.jit(do_not_specialize=["T"])
def tokens_kernel(
    p_x, p_a, p_b, p_scale, p_bias, p_y, p_sums, p_counters, T,
    K: tl.constexpr, R: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr, RB: tl.constexpr, DB: tl.constexpr,
    WIDTH: tl.constexpr, TILES: tl.constexpr, HELD: tl.constexpr, GROUPS: tl.constexpr,
    CTAS: tl.constexpr, AHEAD: tl.constexpr,
    BM: tl.constexpr, PARTS: tl.constexpr, RING: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """p_sums: of every part a ring of P [BM, RB], then of every group a ring of the update [BM, WIDTH], float32.

    p_counters: of every part, then of every group, an int32 every LINE. All zero.
    """
    DTYPE: tl.constexpr = p_a.dtype.element_ty
    P_SIZE: tl.constexpr = BM * RB
    U_SIZE: tl.constexpr = BM * WIDTH
    i, j = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    first = j * WIDTH
    o_t, o_r, o_c = tl.arange(0, BM), tl.arange(0, RB), tl.arange(0, DB)
    m_t = o_t[:, None] < T
    rows, left = R - i * RB, D - first  # that exist, of a tile's rows and of the group's columns
    o_w = (i * RB + o_r[:, None]) * D + first + o_c[None, :]
    p_all_a, p_all_b = p_a, p_b
    p_a += o_w
    p_b += o_w
    p_p = p_sums + i * (RING * P_SIZE)
    p_u = p_sums + PARTS * RING * P_SIZE + j * (RING * U_SIZE)
    o_p = o_t[:, None] * RB + o_r[None, :]
    o_u = o_t[:, None] * WIDTH + o_c[None, :]
    p_part = p_counters + i * LINE
    p_group = p_counters + (PARTS + j) * LINE
    zs = ()
    for t in tl.static_range(TILES):
        m_x = m_t & (t * DB + o_c[None, :] < left)
        zs += (
            tl.load(p_x + o_t[:, None] * D + first + t * DB + o_c[None, :], mask=m_x, other=0.0).to(
                tl.float32
            ),
        )
    ws = _along(p_a, 0, rows, left, True, RB, DB, HELD)
    for k in range(K):
        o_k = k * (R * D)
        p = tl.zeros((BM, RB), tl.float32)
        for t in tl.static_range(TILES):
            w = ws[t] if t < HELD else _tile_along(p_a, o_k, rows, left, True, t, RB, DB)
            p = tl.dot(zs[t].to(DTYPE), tl.trans(w), p, input_precision=EXACT)
        p_now = p_p + k % RING * P_SIZE
        tl.atomic_add(p_now + o_p, p, mask=m_t, sem="relaxed")
        arrive(p_part)
        bs = _along(p_b, o_k, rows, left, True, RB, DB, HELD)
        ws = _along(p_a, o_k + R * D, rows, left, k + 1 < K, RB, DB, HELD)
        if AHEAD:
            _ask_ahead(p_all_a, p_all_b, k, CTAS, K, R * D)
        wait(p_part, (k + 1) * GROUPS)
        p = tl.load(p_now + o_p, mask=m_t, other=0.0, cache_modifier=".cg")
        # Nobody reads the buffer before this one any more, and nobody adds to it before the next arrival.
        _zero_share(p_p + (k + RING - 1) % RING * P_SIZE, j, GROUPS, P_SIZE)
        h = ACT(p).to(DTYPE)
        u_now = p_u + k % RING * U_SIZE
        for t in tl.static_range(TILES):
            b = bs[t] if t < HELD else _tile_along(p_b, o_k, rows, left, True, t, RB, DB)
            u = tl.dot(h, b, input_precision=EXACT)
            tl.atomic_add(u_now + t * DB + o_u, u, mask=m_t, sem="relaxed")
        arrive(p_group)
        wait(p_group, (k + 1) * PARTS)
        moved = ()
        for t in tl.static_range(TILES):
            moved += (zs[t] + tl.load(u_now + t * DB + o_u, mask=m_t, other=0.0, cache_modifier=".cg"),)
        zs = moved
        _zero_share(p_u + (k + RING - 1) % RING * U_SIZE, i, PARTS, U_SIZE)
    if i == 0:  # all parts hold the same state
        for t in tl.static_range(TILES):
            o_d = first + t * DB + o_c
            m_d = o_d < D
            o_y = o_t[:, None] * D + o_d[None, :]
            x = tl.load(p_x + o_y, mask=m_t & m_d[None, :], other=0.0).to(tl.float32)
            scale = tl.load(p_scale + o_d, mask=m_d, other=0.0)
            bias = tl.load(p_bias + o_d, mask=m_d, other=0.0)
            y = (zs[t] - x) * scale[None, :] + bias[None, :]
            tl.store(p_y + o_y, y.to(p_y.dtype.element_ty), mask=m_t & m_d[None, :])
