"""The products of a round: P = z A^T, what a block's steps add for one another, and z += H B with what follows from it.

One kernel, because all are products of 16-bit operands summed in float32, and what surrounds them is memory traffic:
reading z, adding, writing z and the next round's operand, z in 16 bits, in one pass costs 10 bytes an element of the
state; torch's product, addition and cast cost 22.

A product too small to fill the device is split along what it sums over. The parts meet in memory, and the program that
arrives last adds them, in their order: the same bits every time.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import triton_form
from .device import EXACT
from .launch import Launch
from .tiles import Tile


@dataclass(frozen=True, slots=True)
class View:
    """Where an operand's elements lie, in elements: token, feature or row times `row`, and so on.

    An activation's rows are tokens, a weight's what is summed over.
    """

    row: int
    lane: int = 0
    column: int = 1
    start: int = 0
    block: int = 0  # from a block of steps to the next


class Product:
    """out = total + x + a W of every lane, summed in float32, or what is asked for beside it.

    Columns before `active` are put through the activation, into `hidden`; the others go to `out`.
    """

    def __init__(
        self,
        *,
        lanes: int,
        columns: int,
        inner: int,
        tile: Tile,
        a: View,
        w: View,
        out: View,
        z: View | None = None,
        total: bool = False,
        x: int = 0,
        finish: bool = False,
        active: int = 0,
        act: str = "linear",
    ) -> None:
        """lanes: L; columns and inner: of a lane's W [inner, columns]; z, total, finish: whether a call gives them; x:
        how often x counts in the sum, -1, 0 or 1."""
        self.lanes, self.columns, self.active, self.tile = lanes, columns, active, tile
        constants: dict[str, Any] = {
            "N": columns, "K": inner, "SPLIT": tile.split,
            "A_START": a.start, "A_ROW": a.row, "A_LANE": a.lane,
            "W_START": w.start, "W_ROW": w.row, "W_COLUMN": w.column, "W_LANE": w.lane, "W_BLOCK": w.block,
            "O_START": out.start, "O_ROW": out.row, "O_LANE": out.lane,
            "Z_ROW": z.row if z else 0, "Z_LANE": z.lane if z else 0,
            "TOTAL": total, "X": x, "FINISH": finish, "ACTIVE": active, "ACT": triton_form(act),
            "BM": tile.rows, "BN": tile.columns, "BK": tile.inner, "HALVINGS": tile.ends.bit_length() - 1,
        }  # fmt: skip
        most = {"maxnreg": tile.registers} if tile.registers else {}
        self._launch = Launch(matmul_kernel, constants, num_warps=tile.warps, num_stages=tile.stages, **most)

    def __call__(
        self,
        tokens: int,
        block: int,
        a: Tensor,
        w: Tensor,
        out: Tensor | None,
        *,
        hidden: Tensor | None = None,
        x: Tensor | None = None,
        z: Tensor | None = None,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        total: Tensor | None = None,
        parts: Tensor | None = None,
        turns: Tensor | None = None,
    ) -> None:
        """Launches it, on tensors that lie as the views say.

        Args:
            tokens: T.
            block: Which block of steps W is taken of.
            a: [T, L, inner], of any float dtype. Products take it in W's.
            w: The weights.
            out: Of any float dtype.
            hidden: Laid out as `out`, in the weights' dtype.
            x: [T, columns], any float dtype.
            z: To which the sum is written, too, in z's dtype.
            scale, bias: [columns] float32, for out = scale * sum + bias.
            total: Laid out as `out`, float32, and may be it.
            parts: Float32, `self.tile.programs` times rows times columns of a tile, where it is split.
            turns: int32 zeros, one a tile and lane, left so.
        """
        grid = (self.tiles(tokens), self.tile.split, self.lanes)
        self._launch(grid, a, w, total, out, hidden, x, z, scale, bias, parts, turns, tokens, block)

    def tiles(self, tokens: int) -> int:
        """Tiles of one lane's product."""
        return self.tile.tiles(tokens, self.columns, self.active)


def matmul_memory(products: list[Product], tokens: int, device: torch.device) -> dict[str, Tensor]:
    """`parts` and `turns` for launches that follow one another; nothing where none of them is split."""
    split = [(p.tile, p.tiles(tokens) * p.lanes) for p in products if p.tile.split > 1]
    if not split:
        return {}
    values = max(tiles * tile.split * tile.rows * tile.columns for tile, tiles in split)
    turns = max(tiles for _, tiles in split)
    parts = torch.empty(values, dtype=torch.float32, device=device)
    return {"parts": parts, "turns": torch.zeros(turns, dtype=torch.int32, device=device)}


@triton.jit
def _halves(tile):
    """The left and the right half of the columns."""
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, half)), (0, 2, 1)))


@triton.jit(do_not_specialize=["T", "block"])
def matmul_kernel(
    p_a, p_w, p_total, p_out, p_hidden, p_x, p_z, p_scale, p_bias, p_parts, p_turns, T, block,
    N: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    A_START: tl.constexpr, A_ROW: tl.constexpr, A_LANE: tl.constexpr,
    W_START: tl.constexpr, W_ROW: tl.constexpr, W_COLUMN: tl.constexpr, W_LANE: tl.constexpr, W_BLOCK: tl.constexpr,
    O_START: tl.constexpr, O_ROW: tl.constexpr, O_LANE: tl.constexpr, Z_ROW: tl.constexpr, Z_LANE: tl.constexpr,
    TOTAL: tl.constexpr, X: tl.constexpr, FINISH: tl.constexpr, ACTIVE: tl.constexpr, ACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    i_tile, i_s, lane = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    # Tiles that run at the same time share rows of a: 8 rows of tiles at a time, column by column.
    rows = tl.cdiv(T, BM)
    # No tile has columns of both kinds: two ends of one take 255 registers, and a stack.
    ACTIVE_TILES: tl.constexpr = (ACTIVE + BN - 1) // BN
    COLUMNS: tl.constexpr = ACTIVE_TILES + (N - ACTIVE + BN - 1) // BN
    group = i_tile // (8 * COLUMNS)
    height = min(rows - group * 8, 8)
    i_m = group * 8 + i_tile % (8 * COLUMNS) % height
    i_n = i_tile % (8 * COLUMNS) // height
    SPAN: tl.constexpr = (K + BK * SPLIT - 1) // (BK * SPLIT) * BK  # summed by one program
    o_t = (i_m * BM + tl.arange(0, BM)).to(tl.int64)
    n_first, n_end = i_n * BN, N
    if ACTIVE > 0 and ACTIVE < N:
        active = i_n < ACTIVE_TILES
        n_first += tl.where(active, 0, ACTIVE - ACTIVE_TILES * BN)
        n_end = tl.where(active, ACTIVE, N)
    o_n = n_first + tl.arange(0, BN)
    o_k = i_s * SPAN + tl.arange(0, BK)
    m_t = o_t[:, None] < T
    m_n = o_n[None, :] < n_end
    p_a += A_START + lane * A_LANE + o_t[:, None] * A_ROW + o_k[None, :]
    p_w += W_START + lane * W_LANE + block.to(tl.int64) * W_BLOCK
    p_w += o_k[:, None].to(tl.int64) * W_ROW + o_n[None, :].to(tl.int64) * W_COLUMN
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(0, SPAN, BK):
        if SPAN * SPLIT == K:
            a = tl.load(p_a, mask=m_t, other=0.0)
            w = tl.load(p_w, mask=m_n, other=0.0)
        else:
            m_k = o_k < K - k
            a = tl.load(p_a, mask=m_t & m_k[None, :], other=0.0)
            w = tl.load(p_w, mask=m_k[:, None] & m_n, other=0.0)
        acc = tl.dot(a.to(w.dtype), w, acc, input_precision=EXACT)
        p_a += BK
        p_w += BK * W_ROW
    if SPLIT > 1:
        tile = lane * tl.num_programs(0) + i_tile
        o_part = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        p_parts += tile * (SPLIT * BM * BN) + o_part
        tl.store(p_parts + i_s * (BM * BN), acc)
        tl.debug_barrier()
        if tl.atomic_add(p_turns + tile, 1, sem="acq_rel") < SPLIT - 1:
            return
        tl.debug_barrier()
        tl.store(p_turns + tile, 0)
        acc = tl.zeros([BM, BN], dtype=tl.float32)
        for part in range(SPLIT):  # L1 is not coherent, hence .cg
            acc += tl.load(p_parts + part * (BM * BN), cache_modifier=".cg")
    # A tile's end, 16 values a thread at a time: of 128 by 128 at once it takes 190 registers, and a multiprocessor
    # holds one program instead of two; of 128 by 256 in quarters, 48 bytes of stack.
    ends = (acc,)
    for _ in tl.static_range(HALVINGS):
        halves = ()
        for i in tl.static_range(len(ends)):
            halves = halves + _halves(ends[i])
        ends = halves
    PART: tl.constexpr = BN // len(ends)
    for i in tl.static_range(len(ends)):
        acc = ends[i]
        o_c = n_first + i * PART + tl.arange(0, PART)
        m_c = o_c[None, :] < n_end
        o_out = O_START + lane * O_LANE + o_t[:, None] * O_ROW + o_c[None, :]
        if TOTAL:
            acc += tl.load(p_total + o_out, mask=m_t & m_c, other=0.0)
        if X != 0:
            x = tl.load(p_x + o_t[:, None] * N + o_c[None, :], mask=m_t & m_c, other=0.0)
            acc += X * x.to(tl.float32)
        if Z_ROW > 0:
            tl.store(p_z + lane * Z_LANE + o_t[:, None] * Z_ROW + o_c[None, :], acc, mask=m_t & m_c)
        if FINISH:
            scale = tl.load(p_scale + o_c, mask=o_c < N, other=0.0)
            bias = tl.load(p_bias + o_c, mask=o_c < N, other=0.0)
            acc = acc * scale[None, :] + bias[None, :]
        if ACTIVE == N:
            tl.store(p_hidden + o_out, ACT(acc), mask=m_t & m_c)
        elif ACTIVE == 0:
            tl.store(p_out + o_out, acc, mask=m_t & m_c)
        elif active:
            tl.store(p_hidden + o_out, ACT(acc), mask=m_t & m_c)
        else:
            tl.store(p_out + o_out, acc, mask=m_t & m_c)
