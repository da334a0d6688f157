"""The decode kernel: a whole DLR-Net for up to 64 tokens in one persistent cooperative launch.

A CTA is (lane, slice): it holds d/C columns of its lane's state and streams those columns of the lane's A and B once.
A round is S steps, by look-ahead (`solve.py`):

    1. partial P_i = z[:, slice] A_i[:, slice]^T of the round's steps, added into the lane's P
    2. barrier among the C CTAs of the lane; this round's B and Gram tiles and the next A are requested before the wait
    3. every CTA solves the round from P and the Gram tiles: h_i
    4. z[:, slice] += sum_i h_i B_i[:, slice], then 1. for the next round

and at the end the lanes' z - x are added, and the last lane to arrive at a slice writes y. Lanes never wait for each
other. `decode_plan.py` holds the geometry and the argument why the workspace is left as it was found;
`tests/triton_kernels/decode_steps.py` runs the same schedule in plain torch, one CTA at a time, in any order.

A step's rank is held as Q tiles of RP rows, its parts, of which the last may be ragged. Tile t of a round is part t % Q
of step t // Q. Parts of one step do not depend on each other: there are Gram products between steps only.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import triton_form
from .chain import ChainWeights
from .decode_plan import DecodePlan, Workspace, workspace
from .device import EXACT
from .launch import Launch

__all__ = ["DecodePlan", "Workspace", "decode", "workspace"]


def decode(
    x: Tensor, chain: ChainWeights, gram: Tensor | None, *, plan: DecodePlan, workspace: Workspace
) -> Tensor:
    """The output of a DLR-Net of plain steps for few tokens, in one launch.

    Args:
        x: The tokens, [T, d] with T <= plan.tokens, of any float dtype, rows contiguous. All tensors begin at multiples
            of 16 bytes, as what torch allocates does.
        chain: The weights: A and B contiguous, float32, bfloat16 or float16; scale and bias float32; an activation of
            KERNEL_ACTS.
        gram: [L, N, m, m] in the weights' dtype, rows contiguous, of blocks of m / r steps that plan.steps divides, or
            of any number where N = 1; not read for plan.steps == 1.
        plan: Who holds what, made for a chain of this shape: the launch fails where the device cannot run its
            lanes * slices CTAs at once.
        workspace: Made by `workspace` for this plan, used by no other launch at the same time.

    Returns:
        y, [T, d], in x's dtype, contiguous.

    Raises:
        ValueError: The tensors do not fit the plan.
    """
    plan.check(x, chain, gram)
    if plan.steps == 1:
        gram = None
    A, B, scale, bias, _, act = chain
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = plan.steps if gram is None else gram.shape[-1] // plan.rank
    strides = x.stride(0), *((0, 0, 0) if gram is None else gram.stride()[:3])
    _launch(plan, block, act, strides, x.dtype, A.dtype, x.device)(
        (plan.lanes * plan.slices, 1, 1),
        x, A, B, scale, bias, gram, y, workspace.values, workspace.counters, x.shape[0], *strides,
    )  # fmt: skip
    return y


@lru_cache(maxsize=256)
def _launch(plan: DecodePlan, block: int, act: str, *_: object) -> Launch:
    """The launch, of its own for all else by which Triton would tell variants of the kernel apart: see `Launch`."""
    constants = plan.constants() | {"BLOCK": block, "ACT": triton_form(act)}
    return Launch(decode_kernel, constants, **launch_options(plan))


def launch_options(plan: DecodePlan) -> dict[str, int | bool]:
    """The compiler's options. One stage: what is pipelined, over the tiles of a slice, says so itself."""
    return {"num_warps": plan.num_warps, "num_stages": 1, "launch_cooperative_grid": True}


@triton.jit
def _arrive(p_counter):
    # The release is one thread's. Before 3.9 Triton puts no bar.sync between the others' stores and it.
    tl.debug_barrier()
    tl.atomic_add(p_counter, 1, sem="release")


@triton.jit
def _wait(p_counter, target):
    seen = tl.atomic_add(p_counter, 0, sem="acquire")  # a plain acquiring load in PTX
    while seen < target:
        seen = tl.atomic_add(p_counter, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _rows_exist(t: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, Q: tl.constexpr):
    """Which rows of tile t are no padding of the rank."""
    return t % Q * RP + tl.arange(0, RP) < R


@triton.jit
def _weights(
    p_w, o_w, m_w, left, D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, Q: tl.constexpr, S: tl.constexpr
):
    """Tiles [RP, DC] of S consecutive steps, of which `left` exist; the others are zero. m_w: the columns."""
    tiles = ()
    for t in tl.static_range(S * Q):
        mask = _rows_exist(t, R, RP, Q)[:, None] & m_w & (t // Q < left)
        start = (t // Q * R + t % Q * RP) * D
        tile = tl.load(p_w + start + o_w, mask=mask, other=0.0, eviction_policy="evict_first")
        tiles += (tile,)
    return tiles


@triton.jit
def _gram_tiles(
    p_gram, s_j, left,
    R: tl.constexpr, RP: tl.constexpr, Q: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The Gram tiles [RP, RP] of a round, (t, u) for u of the steps before t's, in the order of t.

    Unless blocks are WHOLE rounds, steps that do not exist are not in the block either.
    """
    o_r = tl.arange(0, RP)
    o_g = o_r[:, None] * s_j + o_r[None, :]
    tiles = ()
    for t in tl.static_range(S * Q):
        for u in tl.static_range(t // Q * Q):
            mask = _rows_exist(u, R, RP, Q)[:, None] & _rows_exist(t, R, RP, Q)[None, :]
            if not WHOLE:
                mask = mask & (t // Q < left)
            start = (u // Q * R + u % Q * RP) * s_j + t // Q * R + t % Q * RP
            tiles += (tl.load(p_gram + start + o_g, mask=mask, other=0.0),)
    return tiles


@triton.jit
def _settle(tiles, true, COUNT: tl.constexpr):
    """The tiles themselves, for a `true` that always is.

    The compiler moves the operand of a product to shared memory right after what makes it. After a load that
    is a wait for each tile in turn; after this, called behind a barrier, one wait for all.
    """
    settled = ()
    for i in tl.static_range(COUNT):
        settled += (tl.where(true, tiles[i], tl.zeros_like(tiles[i])),)
    return settled


@triton.jit
def _zeros(BM: tl.constexpr, RP: tl.constexpr, COUNT: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles += (tl.zeros((BM, RP), tl.float32),)
    return tiles


@triton.jit
def _project(z, weights, ps, COUNT: tl.constexpr):
    """p_i + z w_i^T of all weight tiles w_i [RP, DC]."""
    sums = ()
    for i in tl.static_range(COUNT):
        w = weights[i]
        sums += (tl.dot(z.to(w.dtype), tl.trans(w), ps[i], input_precision=EXACT),)
    return sums


@triton.jit
def _update(z, hs, weights, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        z = tl.dot(hs[i], weights[i], z, input_precision=EXACT)
    return z


@triton.jit
def _publish(
    p_p, ps, m_t, ADD: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, Q: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    for t in tl.static_range(COUNT):
        mask = m_t & _rows_exist(t, R, RP, Q)[None, :]
        if ADD:
            tl.atomic_add(p_p + t * TILE, ps[t], mask=mask, sem="relaxed")
        else:
            tl.store(p_p + t * TILE, ps[t], mask=mask)


@triton.jit
def _gather(
    p_p, m_t, SLOT: tl.constexpr, SLOTS: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, Q: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The tiles of a round's P, summed over its slots in their order. L1 is not coherent, hence .cg.

    Each is loaded as [BM, RP, 1] and summed over its last dimension, which keeps the compiler from loading what
    becomes a left operand in that operand's layout: every warp would hold all of it, and activate it.
    """
    ps = ()
    for t in tl.static_range(COUNT - 1, -1, -1):  # the first, which is needed first, last: see `_settle`
        mask = (m_t & _rows_exist(t, R, RP, Q)[None, :])[:, :, None]
        p = tl.load(p_p[:, :, None] + t * TILE, mask=mask, other=0.0, cache_modifier=".cg")
        ps = (p,) + ps
    for slot in range(1, SLOTS):
        sums = ()
        for t in tl.static_range(COUNT):
            mask = (m_t & _rows_exist(t, R, RP, Q)[None, :])[:, :, None]
            start = slot * SLOT + t * TILE
            sums += (ps[t] + tl.load(p_p[:, :, None] + start, mask=mask, other=0.0, cache_modifier=".cg"),)
        ps = sums
    sums = ()
    for t in tl.static_range(COUNT):
        sums += (tl.sum(ps[t], 2),)
    return sums


@triton.jit
def _solve(ps, grams, DTYPE: tl.constexpr, ACT: tl.constexpr, Q: tl.constexpr, S: tl.constexpr):
    """The tiles of h [BM, RP] of a round, as in solve.py."""
    hs = ()
    for t in tl.static_range(S * Q):
        # Before tile t's Gram tiles come those of the steps before, i Q a part of step i, and of its earlier parts.
        p = ps[t]
        for u in tl.static_range(t // Q * Q):
            gram = grams[Q * Q * (t // Q * (t // Q - 1) // 2) + t % Q * (t // Q * Q) + u]
            p = tl.dot(hs[u], gram, p, input_precision=EXACT)
        hs += (ACT(p).to(DTYPE),)
    return hs


@triton.jit
def _write(p_y, p_scale, p_bias, delta, o_d, m_d, o_y, m_y):
    scale = tl.load(p_scale + o_d, mask=m_d, other=0.0)
    bias = tl.load(p_bias + o_d, mask=m_d, other=0.0)
    y = delta * scale[None, :] + bias[None, :]
    tl.store(p_y + o_y, y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["T"])
def decode_kernel(
    p_x, p_a, p_b, p_scale, p_bias, p_gram, p_y, p_values, p_counters,
    T, s_xt, s_gl, s_gn, s_gj,
    L: tl.constexpr, K: tl.constexpr, R: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr,
    BM: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr, DS: tl.constexpr, DC: tl.constexpr, STAGES: tl.constexpr, DETERMINISTIC: tl.constexpr,
    RING: tl.constexpr, SHARE: tl.constexpr, Y_START: tl.constexpr, Z_START: tl.constexpr,
    EXITS: tl.constexpr, TURNS: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """All of one CTA's part: see the top of the file, and `DecodePlan` for the numbers that are compiled in.

    The call       p_x [T, D] and p_y [T, D]: tokens and output, any float dtype. T: tokens, BM at most. s_xt: elements
                   from a token of x to the next.
    The weights    p_a, p_b [L, K, R, D]: A and B. p_scale, p_bias [D]: float32. p_gram [L, N, m, m]: Gram blocks, None
                   for S = 1; s_gl, s_gn, s_gj: elements from a lane, a block and a row of it to the next.
    The chain      L: lanes. K: steps a lane. R: rank. D: features. ACT: the activation, a `triton.jit` function.
    A round        BM: rows of a tile of tokens. S: its steps. Q: parts of a step. RP: rows of a part. BLOCK: steps of a
                   Gram block.
    A CTA          C: CTAs, and so slices, a lane. DS: columns of a slice. DC: columns of a tile of it. STAGES: of the
                   software pipeline over the tiles. DETERMINISTIC: sum in a fixed order, in a slot for each writer.
    The workspace  p_values: float32. RING: buffers of P a lane, from the first value on. SHARE: values of a buffer that
                   a CTA zeroes. Y_START, Z_START: where the lanes' sums and the states begin.
                   p_counters: int32. LINE: counters from one that is used to the next: first a barrier a lane, from
                   EXITS on an exit counter a lane, from TURNS on a turn counter a slice.
    """
    DTYPE: tl.constexpr = p_a.dtype.element_ty
    STEP: tl.constexpr = R * D  # elements of a step's A
    ROUNDS: tl.constexpr = (K + S - 1) // S
    CHUNKS: tl.constexpr = (DS + DC - 1) // DC  # tiles a slice; one stays in registers
    TILES: tl.constexpr = S * Q  # of P, and so of A and of B, in a round
    TILE: tl.constexpr = BM * RP  # values of a tile of P
    GRAMS: tl.constexpr = S * (S - 1) // 2 * Q * Q
    SLOT: tl.constexpr = TILES * TILE
    P_SLOTS: tl.constexpr = C if DETERMINISTIC else 1
    Y_SLOTS: tl.constexpr = L if DETERMINISTIC else 1
    BUFFER: tl.constexpr = P_SLOTS * SLOT
    i_l = (tl.program_id(0) // C).to(tl.int64)
    i_c = tl.program_id(0) % C
    first = i_c * DS
    o_t = tl.arange(0, BM)[:, None]
    o_r = tl.arange(0, RP)
    o_c = tl.arange(0, DC)
    m_t = o_t < T
    width = DS if D % DS == 0 else tl.minimum(DS, D - first)
    m_c = o_c[None, :] < width
    o_w = o_r[:, None] * D + o_c[None, :]
    p_a += i_l * (K * STEP) + first
    p_b += i_l * (K * STEP) + first
    p_x += first + o_t * s_xt + o_c[None, :]
    p_p = p_values + i_l * (RING * BUFFER)  # the lane's ring of buffers
    o_p = o_t * RP + o_r[None, :]
    o_slot = i_c * SLOT if DETERMINISTIC else 0
    p_z = p_values + Z_START + i_l * (BM * D) + first + o_t * D + o_c[None, :]
    p_barrier = p_counters + i_l * LINE
    if S > 1:
        p_gram += i_l * s_gl

    if CHUNKS == 1:
        z = tl.load(p_x, mask=m_t & m_c, other=0.0).to(tl.float32)
        ws = _weights(p_a, o_w, m_c, K, D, R, RP, Q, S)
    else:
        for o_q in range(0, CHUNKS * DC, DC):
            m_q = m_t & (o_c[None, :] < width - o_q)
            tl.store(p_z + o_q, tl.load(p_x + o_q, mask=m_q, other=0.0).to(tl.float32), mask=m_q)

    for n in range(ROUNDS):
        left = K - n * S
        o_n = n * (S * STEP)
        # ---- P of this round
        ps = _zeros(BM, RP, TILES)
        if CHUNKS == 1:
            ps = _project(z, ws, ps, TILES)
        else:
            tl.debug_barrier()  # other threads read the state than wrote it
            for o_q in tl.range(0, CHUNKS * DC, DC, num_stages=STAGES):
                m_q = o_c[None, :] < width - o_q
                z = tl.load(p_z + o_q, mask=m_t & m_q, other=0.0)
                ws = _weights(p_a + o_n + o_q, o_w, m_q, left, D, R, RP, Q, S)
                ps = _project(z, ws, ps, TILES)
        if C > 1:
            p_round = p_p + (n % RING) * BUFFER + o_p
            _publish(p_round + o_slot, ps, m_t, not DETERMINISTIC, R, RP, Q, TILE, TILES)
            _arrive(p_barrier)

        # ---- what does not depend on the other CTAs is requested before the wait. B and the Gram tiles reach shared
        # memory meanwhile; the next A stays in flight until the next round's P. All of it after the arrival, whose
        # release would wait for loads before it.
        if CHUNKS == 1:
            bs = _weights(p_b + o_n, o_w, m_c, left, D, R, RP, Q, S)
        grams = ()
        if S > 1:
            WHOLE: tl.constexpr = BLOCK % S == 0
            o_block = n * S // BLOCK
            o_step = (n * S % BLOCK) * R
            grams = _gram_tiles(p_gram + o_block * s_gn + o_step * (s_gj + 1), s_gj, left, R, RP, Q, S, WHOLE)
        if CHUNKS == 1:
            ws = _weights(p_a + o_n + S * STEP, o_w, m_c, left - S, D, R, RP, Q, S)
            tl.debug_barrier()
            bs = _settle(bs, left > 0, TILES)
            grams = _settle(grams, left > 0, GRAMS)
        if C > 1:
            _wait(p_barrier, (n + 1) * C)
            ps = _gather(p_round, m_t, SLOT, P_SLOTS, R, RP, Q, TILE, TILES)
            if not DETERMINISTIC:
                # Nobody reads round n - 1 any more, nobody adds to its buffer before barrier n + 1.
                o_z = i_c * SHARE + tl.arange(0, SHARE)
                p_share = p_p + ((n + RING - 1) % RING) * BUFFER + o_z
                tl.store(p_share, tl.zeros((SHARE,), tl.float32), mask=o_z < BUFFER)

        # ---- the state moves on
        hs = _solve(ps, grams, DTYPE, ACT, Q, S)
        if CHUNKS == 1:
            z = _update(z, hs, bs, TILES)
        else:
            for o_q in tl.range(0, CHUNKS * DC, DC, num_stages=STAGES):
                m_q = o_c[None, :] < width - o_q
                z = tl.load(p_z + o_q, mask=m_t & m_q, other=0.0)
                bs = _weights(p_b + o_n + o_q, o_w, m_q, left, D, R, RP, Q, S)
                z = _update(z, hs, bs, TILES)
                tl.store(p_z + o_q, z, mask=m_t & m_q)

    # ---- y: of this CTA where there is one lane, else of the last lane to arrive
    if CHUNKS > 1:
        tl.debug_barrier()
    o_y = first + o_t * D + o_c[None, :]
    p_sum = p_values + Y_START
    for o_q in range(0, CHUNKS * DC, DC):
        m_q = m_t & (o_c[None, :] < width - o_q)
        delta = tl.load(p_z + o_q, mask=m_q, other=0.0) if CHUNKS > 1 else z
        delta -= tl.load(p_x + o_q, mask=m_q, other=0.0).to(tl.float32)
        if L == 1:
            _write(p_y, p_scale, p_bias, delta, first + o_q + o_c, o_c < width - o_q, o_y + o_q, m_q)
        elif DETERMINISTIC:
            tl.store(p_sum + i_l * (BM * D) + o_y + o_q, delta, mask=m_q)
        else:
            tl.atomic_add(p_sum + o_y + o_q, delta, mask=m_q, sem="relaxed")
    if L > 1:
        p_turn = p_counters + TURNS + i_c * LINE
        tl.debug_barrier()
        if tl.atomic_add(p_turn, 1, sem="acq_rel") == L - 1:
            for o_q in range(0, CHUNKS * DC, DC):
                m_q = m_t & (o_c[None, :] < width - o_q)
                delta = tl.load(p_sum + o_y + o_q, mask=m_q, other=0.0, cache_modifier=".cg")
                for slot in range(1, Y_SLOTS):
                    delta += tl.load(
                        p_sum + slot * (BM * D) + o_y + o_q, mask=m_q, other=0.0, cache_modifier=".cg"
                    )
                _write(p_y, p_scale, p_bias, delta, first + o_q + o_c, o_c < width - o_q, o_y + o_q, m_q)
                if not DETERMINISTIC:
                    tl.debug_barrier()  # all threads have read before any writes
                    tl.store(p_sum + o_y + o_q, tl.zeros((BM, DC), tl.float32), mask=m_q)
            tl.store(p_turn, 0)

    # ---- the last CTA of the lane to leave: all have passed their last wait and read the last P
    if C > 1:
        p_exit = p_counters + EXITS + i_l * LINE
        tl.debug_barrier()
        if tl.atomic_add(p_exit, 1, sem="acq_rel") == C - 1:
            if not DETERMINISTIC:
                for t in range(TILES):
                    p_last = p_p + ((ROUNDS - 1) % RING) * BUFFER + t * TILE + o_p
                    tl.store(p_last, tl.zeros((BM, RP), tl.float32), mask=m_t)
            tl.store(p_barrier, 0)
            tl.store(p_exit, 0)
