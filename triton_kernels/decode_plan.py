"""The geometry of the decode kernel: who holds what, the layout of its memory, what a wait waits for.

The kernel (`decode.py`) and its schedule in plain torch (`tests/triton_kernels/decode_steps.py`) take every number from
here.

Workspace, float32 values: per lane a ring of three buffers of P, one buffer a round, [slot, tile, token,
row] with the parts of every step of the round; then Y [slot, token, d]; then, where a slice is too
wide for registers, the state [lane, token, d]. P and Y have one slot that all add into, in the order they
come; or, for `deterministic`, one a writer, summed in their order by the reader. int32 counters, each on a
line of its own: a barrier and an exit counter a lane, a turn counter a slice.

What is added into is zero between launches, and nothing else is read before it is written:
  - barrier n: every CTA of the lane arrives once it has added its part of round n, and waits for (n + 1) * C.
  - Buffer n % 3 is read after wait n and before arrival n + 1. So after wait n + 1 nobody reads it any more:
    each CTA then zeroes its share of it, before arrival n + 2. It is next added to after wait n + 2. Two
    buffers would not do: round n + 2 is added to after wait n + 1, when a slower CTA may still be zeroing.
  - The last round's buffer and both counters of the lane are zeroed by the last CTA to leave. A CTA leaves
    after its last wait and its last read of P, so no wait can miss a count: when the exit count is complete,
    all waits are over. Nothing of the lane is touched again before the next launch starts.
  - Y's slice and its turn counter are zeroed by the last lane to arrive, which alone reads them.
"""

from dataclasses import dataclass
from itertools import product
from math import ceil

import torch
from torch import Tensor

from .chain import ChainWeights

# Of a round of several steps, in columns of P. A step costs a S-th of a barrier, of 1 us, and reading (S - 1) / 2 Gram
# tiles of r^2 elements, at 107 GB/s: together the least at about 330 columns, at any rank.
MAX_WIDTH = 384
MAX_STEPS = 12  # of a round: its solve is unrolled
MAX_PRODUCTS = 72  # of Gram tiles in a round, for the time to compile: 12 steps of one part, 4 of three
# Rows of a part and the fewest columns of a tile, by the tokens of a plan. Where a product that stands alone or a tile
# of the state is not wider than its 16 or 32 tokens, Triton gives every warp the whole of all products: 2 to 8 times
# the instructions and up to 2.5 times the registers. From 64 tokens on it divides them in another way.
PARTS = {16: (32, 64, 128), 32: (32, 64, 128), 64: (16, 32, 64, 128)}
MIN_TILE = {16: 32, 32: 64, 64: 32}
# Registers of a thread that `_registers` may count, of 255, by the tokens of a plan. Of 31 shapes compiled for sm_90
# (d = 576 to 8192, 1 to 64 lanes, ranks of 16 to 672) none takes a stack for 16 tokens, six for 32, of 16 to 32 bytes,
# and for 64 those of which not even one step fits: 16 to 656 bytes.
MAX_REGISTERS = {16: 170, 32: 170, 64: 128}
MAX_SHARED = 128 * 1024  # bytes of the software pipeline, where a slice is more than a tile

STAGES = 3  # of the software pipeline over the tiles of a slice
RING = 3  # buffers of P
LINE = 32  # int32 counters a cache line


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How one shape of DLR-Net is decoded.

    Raises:
        ValueError: The numbers do not go together.
    """

    lanes: int
    depth: int  # steps a lane, K
    rank: int
    hidden: int  # d
    tokens: int  # the most tokens of a call and the rows of a tile: 16, 32 or 64
    steps: int  # of a round, S
    slices: int  # CTAs a lane, C
    tile: int  # columns of the state that are held at once: a power of two
    part: int  # rows of the rank that are held as one tile: a power of two
    num_warps: int = 8
    deterministic: bool = False  # the same bits every time, for more traffic: C times P, L times Y

    def __post_init__(self) -> None:
        sizes = (self.lanes, self.depth, self.rank, self.hidden, self.steps, self.slices, self.num_warps)
        if min(sizes) < 1:
            raise ValueError(f"a decode plan counts from 1: {self}")
        if self.tokens not in (16, 32, 64):
            raise ValueError(f"a decode plan is for 16, 32 or 64 tokens, not {self.tokens}")
        if self.tile < 16 or self.tile & (self.tile - 1):
            raise ValueError(f"a tile is a power of two of at least 16 columns, not {self.tile}")
        if self.part < 16 or self.part & (self.part - 1):
            raise ValueError(f"a part is a power of two of at least 16 rows, not {self.part}")
        if (self.slices - 1) * self.slice_width >= self.hidden:
            raise ValueError(
                f"{self.slices} slices of {self.slice_width} columns leave some of {self.hidden} empty"
            )
        if self.depth * self.rank * self.hidden >= 2**31:
            raise ValueError(
                "a lane's A has more than 2^31 elements, which the kernel's offsets cannot reach"
            )

    @staticmethod
    def choose(
        *,
        lanes: int,
        depth: int,
        rank: int,
        hidden: int,
        tokens: int,
        sms: int,
        itemsize: int = 2,
        block_steps: int = MAX_STEPS,
        deterministic: bool = False,
    ) -> "DecodePlan":
        """The plan for a chain on a GPU.

        Every multiprocessor gets one CTA, as far as slices of a multiple of 16 columns divide them among the
        lanes. A tile is the whole slice where a round of one step then fits the registers, else 64 columns or
        fewer. A round is as many steps as fit the registers, MAX_STEPS, MAX_WIDTH and MAX_PRODUCTS, and divide
        a Gram block; where that holds all steps, any number, shared out evenly. A step is as few parts as then fit.

        Args:
            lanes, depth, rank, hidden: The shape of A and B.
            tokens: The most tokens of a call, 64 at most.
            sms: The GPU's multiprocessors.
            itemsize: Bytes of an element of the weights.
            block_steps: Steps of a Gram block.
            deterministic: Whether sums are taken in a fixed order.

        Raises:
            ValueError: There are more lanes than multiprocessors, or more tokens; or a lane's A has 2^31 elements.
        """
        if not 1 <= tokens <= 64:
            raise ValueError(f"a decode plan is for 1 to 64 tokens, not {tokens}")
        if lanes > sms:
            raise ValueError(f"{lanes} lanes do not fit {sms} multiprocessors at once")
        slice_width = _up_to(ceil(hidden / (sms // lanes)), 16)
        rows = _power_of_two(tokens)
        most = min(block_steps, depth, MAX_STEPS, max(1, MAX_WIDTH // rank))
        if block_steps >= depth:
            fitting = list(dict.fromkeys(ceil(depth / ceil(depth / s)) for s in range(most, 0, -1)))
        else:
            fitting = [s for s in range(most, 0, -1) if block_steps % s == 0]
        # The fewest tiles first: each is a product and an exchange between warps of its own.
        parts = sorted(PARTS[rows], key=lambda part: (ceil(rank / part), part))

        def most_steps(tile: int) -> tuple[int, int] | None:
            """Steps of a round with such a tile, and rows of a part; None where not even one step fits."""
            for steps, part in product(fitting, parts):
                tiles = ceil(rank / part)
                shared = STAGES * tile * (4 * rows + itemsize * steps * tiles * part)
                whole = tile >= slice_width
                if (
                    (whole or (shared <= MAX_SHARED and (part > rows or rows == 64)))
                    and tiles**2 * steps * (steps - 1) // 2 <= MAX_PRODUCTS
                    and _registers(rows, steps, rank, part, tile, itemsize, whole) <= MAX_REGISTERS[rows]
                ):
                    return steps, part
            return None

        least = MIN_TILE[rows]
        widest = max(least, _power_of_two(slice_width))
        tile = next((t for t in (widest, 64, least) if t <= widest and most_steps(t)), least)
        steps, part = most_steps(tile) or (1, 64)
        return DecodePlan(
            lanes=lanes,
            depth=depth,
            rank=rank,
            hidden=hidden,
            tokens=rows,
            steps=steps,
            slices=ceil(hidden / slice_width),
            tile=tile,
            part=part,
            deterministic=deterministic,
        )

    # ---- who holds what

    @property
    def parts(self) -> int:
        """Tiles of a step, Q."""
        return ceil(self.rank / self.part)

    @property
    def rounds(self) -> int:
        return ceil(self.depth / self.steps)

    @property
    def slice_width(self) -> int:
        """Columns of a slice; the last slice may have fewer."""
        return _up_to(ceil(self.hidden / self.slices), 16)

    @property
    def chunks(self) -> int:
        """Tiles a slice. One: the state stays in registers; more: it lives in the workspace."""
        return ceil(self.slice_width / self.tile)

    # ---- the workspace

    @property
    def p_tiles(self) -> int:
        """Tiles [tokens, part] of P in a round."""
        return self.steps * self.parts

    @property
    def p_slot(self) -> int:
        """float32 values of a slot of a buffer."""
        return self.p_tiles * self.tokens * self.part

    @property
    def p_slots(self) -> int:
        return self.slices if self.deterministic else 1

    @property
    def p_buffer(self) -> int:
        """float32 values of a buffer of P: one lane, one round."""
        return self.p_slots * self.p_slot

    @property
    def p_share(self) -> int:
        """float32 values that a CTA zeroes of a buffer: a power of two; the last CTAs may have none."""
        return _power_of_two(ceil(self.p_buffer / self.slices), 1)

    @property
    def y_slots(self) -> int:
        return self.lanes if self.deterministic else 1

    @property
    def y_start(self) -> int:
        return self.lanes * RING * self.p_buffer if self.slices > 1 else 0

    @property
    def z_start(self) -> int:
        return self.y_start + (self.y_slots * self.tokens * self.hidden if self.lanes > 1 else 0)

    @property
    def zeroed(self) -> int:
        """How many of the values, from the first, are zero between launches."""
        return 0 if self.deterministic else self.z_start

    @property
    def values(self) -> int:
        """float32 values of the workspace."""
        return self.z_start + (self.lanes * self.tokens * self.hidden if self.chunks > 1 else 0)

    @property
    def exits(self) -> int:
        """Index of lane 0's exit counter; the barriers start at 0. A counter every LINE."""
        return self.lanes * LINE

    @property
    def turns(self) -> int:
        """Index of slice 0's turn counter."""
        return 2 * self.lanes * LINE

    @property
    def counters(self) -> int:
        """int32 counters of the workspace."""
        return (2 * self.lanes + self.slices) * LINE

    def constants(self) -> dict[str, int | bool]:
        """The kernel's compile-time arguments but ACT and BLOCK, which `decode_kernel` explains."""
        return {
            "L": self.lanes, "K": self.depth, "R": self.rank, "D": self.hidden,
            "BM": self.tokens, "S": self.steps, "Q": self.parts, "RP": self.part,
            "C": self.slices, "DS": self.slice_width, "DC": self.tile,
            "STAGES": STAGES, "DETERMINISTIC": self.deterministic,
            "RING": RING, "SHARE": self.p_share, "Y_START": self.y_start, "Z_START": self.z_start,
            "EXITS": self.exits, "TURNS": self.turns, "LINE": LINE,
        }  # fmt: skip

    def check(self, x: Tensor, chain: ChainWeights, gram: Tensor | None) -> None:
        """Checks that the tensors of a call, as `decode` takes them, fit this plan.

        Raises:
            ValueError: They do not; the message names the shapes.
        """
        A, B = chain.A, chain.B
        shape = (self.lanes, self.depth, self.rank, self.hidden)
        if not A.shape == B.shape == shape:
            raise ValueError(
                f"the plan is for weights of {list(shape)}, not {list(A.shape)}, {list(B.shape)}"
            )
        if not A.is_contiguous() or not B.is_contiguous() or A.dtype != B.dtype:
            raise ValueError("A and B must be contiguous and of one dtype")
        if x.dim() != 2 or not 0 < x.shape[0] <= self.tokens or x.shape[1] != self.hidden or x.stride(1) != 1:
            raise ValueError(
                f"x must be [1 to {self.tokens}, {self.hidden}] with contiguous rows, not {list(x.shape)}"
            )
        if self.steps == 1:
            return  # rounds of one step read no Gram blocks
        lanes, blocks, rows, width = gram.shape if gram is not None and gram.dim() == 4 else (0, 0, 0, 0)
        block = width // self.rank
        fits = lanes == self.lanes and rows == width > 0 and width % self.rank == 0
        fits = fits and (blocks == 1 or block % self.steps == 0)
        if not fits or blocks * block < self.depth:
            raise ValueError(
                f"Gram blocks must be [{self.lanes}, N, m, m], m a multiple of {self.steps * self.rank},"
                f" not {None if gram is None else list(gram.shape)}"
            )


@dataclass(frozen=True, slots=True)
class Workspace:
    """Device memory of one plan's launches, one at a time: made zero, left zero by every launch."""

    values: Tensor  # [plan.values] float32
    counters: Tensor  # [plan.counters] int32


def workspace(plan: DecodePlan, device: torch.device | str) -> Workspace:
    """Zeroed memory for `decode` with this plan; launches that may overlap, as of two streams, need one each."""
    values = _up_to(plan.values, LINE)
    # one launch for both, where it counts
    zeros = torch.zeros(values + plan.counters, dtype=torch.int32, device=device)
    return Workspace(zeros[: plan.values].view(torch.float32), zeros[values:])


def _registers(rows: int, steps: int, rank: int, part: int, tile: int, itemsize: int, whole: bool) -> int:
    """Registers of a thread for what is held or on its way at once, in a round of `steps`; whole: a tile is a slice.

    Before the wait that is the next A, B and the Gram tiles; after it the next A, P, and left operands.
    """
    tiles = steps * ceil(rank / part)
    weights = tiles * part * tile * itemsize if whole else 0
    grams = steps * (steps - 1) // 2 * (ceil(rank / part) * part) ** 2 * itemsize
    # In products of 16 or 32 rows and less than 64 columns some of the warps hold the same.
    sums = tiles * rows * (part if rows == 64 else max(part, 64)) * 4
    # From 64 rows on, a sum and what is made of it are held together; and for later steps h, by both groups of warps
    # and once more on its way.
    hidden = 3 * tiles * rows * part * itemsize if rows == 64 and steps > 1 else 0
    state = rows * tile * 4 + weights
    return (state + max(weights + grams, sums * (2 if rows == 64 else 1) + hidden)) // 1024


def _power_of_two(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _up_to(n: int, multiple: int) -> int:
    return ceil(n / multiple) * multiple
