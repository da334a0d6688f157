"""The geometry of the decode kernels: who holds what, the layout of their memory, and why nobody reads too early.

One token: a CTA holds `width` columns of the state, of every step. It adds what these columns say to P [K, r], which
is zero at the start, waits for all others at a counter, and reads P.

Several tokens: CTA (i, j) holds the rows of part i of every step's A and B, and the columns of group j of the state.
It adds to P of part i, waits for the CTAs of its part, and reads P; then it adds to the update of group j's columns,
waits for the CTAs of its group, and reads that. P and the update have a ring of three buffers each, a buffer a step:
  - Buffer k % 3 is read after wait k and before arrival k + 1 at the same counter. So after wait k + 1 nobody reads it
    any more: each of those that share it then zeroes its share, before arrival k + 2. It is next added to in step
    k + 3, after wait k + 2. Two buffers would not do: step k + 2 is added to after wait k + 1, when a slower CTA may
    still be zeroing.

All that is added to or counted is zero at the start of a launch: the caller's memory is zeroed by a launch before it.
So launches share nothing, on any stream, in any graph.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from .gpu import Device
from .rounds import Shape

# Rows and columns of a tile of the weights, for several tokens: the first that suits. Smaller ones give narrow models
# more CTAs. Tiles of 128 rows would leave a CTA fewer columns, and so less of the state, but spill 16 to 320 bytes.
TILES = ((64, 64), (32, 32))
FEW = 0.6  # of the multiprocessors that have a CTA: some 80 of 132 take all of the memory's bandwidth
RING = 3  # buffers of P, and of the update
LINE = 32  # int32 counters a cache line
# Bytes, of 255 KB of registers, of the state and of weights on their way together, by the most tokens of a call; and of
# the state alone. What is compiled for sm_80, sm_90 and sm_100 at the default chains then does not spill, but for 8
# bytes of 64 tokens and a state of 64 KB on sm_80, where prefill should take up to 1.5 times as long.
HELD = {1: 128 * 1024, 16: 112 * 1024, 64: 112 * 1024}
STATE = 80 * 1024


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How one shape of DLR-Net of a single lane is decoded.

    For one token, `rows` and `columns` are of a tile of the weights, and all parts are one CTA's. For several tokens a
    CTA has one tile of `rows`, and `tiles` of `columns`.
    """

    depth: int  # steps, K
    rank: int  # r
    hidden: int  # d
    tokens: int  # the most tokens of a call: 1, 16 or 64
    rows: int  # of a tile, a power of two
    columns: int  # of a tile, a power of two
    width: int  # columns of the state that a CTA holds
    held: int  # tiles of A and of B that are on their way while a CTA waits; the others are read when they are wanted
    ahead: bool = (
        False  # whether a step more is asked for into L2: not where it has no room beside what is read
    )
    num_warps: int = 8  # the room above is that of 256 threads

    @property
    def parts(self) -> int:
        """Tiles of rows of a step."""
        return ceil(self.rank / self.rows)

    @property
    def groups(self) -> int:
        """CTAs that share the columns of the state."""
        return ceil(self.hidden / self.width)

    @property
    def tiles(self) -> int:
        """Tiles of a step's A that a CTA reads."""
        return self.parts if self.tokens == 1 else ceil(self.width / self.columns)

    @property
    def ctas(self) -> int:
        return self.groups if self.tokens == 1 else self.groups * self.parts

    @property
    def barriers(self) -> int:
        """Dependent grid-wide steps of a step of the chain."""
        return 1 if self.tokens == 1 else 2

    @property
    def counters(self) -> int:
        """int32 counters: one; or one a part, then one a group."""
        return LINE * (1 if self.tokens == 1 else self.parts + self.groups)

    @property
    def values(self) -> int:
        """float32 values that are added to, in whole cache lines."""
        if self.tokens == 1:
            return _up_to(self.depth * self.rank, LINE)
        return RING * self.tokens * (self.parts * self.rows + self.groups * self.width)


@lru_cache(maxsize=4096)
def plan_decode(shape: Shape, device: Device) -> DecodePlan | None:
    """The plan for a chain on a GPU.

    None where the kernels do not run: on a device without cooperative launches; for more than 64 tokens; for several
    lanes, or one that 32-bit offsets do not reach; for several tokens and float32 weights, whose tiles take all
    registers, or a state that does.
    """
    if (
        not device.cooperative
        or shape.lanes != 1
        or not 1 <= shape.tokens <= 64
        or shape.depth * shape.rank * shape.hidden >= 2**31
    ):
        return None
    sizes = shape.depth, shape.rank, shape.hidden
    ahead = 4 * shape.weight_bytes // shape.depth <= device.l2
    if shape.tokens == 1:
        # Slices of 8 columns are still read 16 bytes at a time: 3072 features give 128 CTAs, not 96.
        width = _up_to(ceil(shape.hidden / device.sms), 8)
        columns = _power_of_two(width, 8)
        rows = max(
            16, 2048 // columns
        )  # 16 bytes a thread of 256; twice that where else 34 tiles took 20 s to compile
        rows *= 2 if shape.rank > 16 * rows else 1
        held = _held(ceil(shape.rank / rows), rows * columns * shape.itemsize, HELD[1])
        return DecodePlan(*sizes, 1, rows, columns, width, held, ahead)
    # Of tiles of 32 rows Triton has every warp hold the whole: 255 registers, and a stack.
    tokens = 16 if shape.tokens <= 16 else 64
    if shape.itemsize > 2:
        return None
    for rows, columns in TILES:
        parts, tiles = ceil(shape.rank / rows), ceil(shape.hidden / columns)
        if parts > device.sms:
            continue
        each = ceil(tiles / (device.sms // parts))  # tiles a CTA
        state = each * tokens * columns * 4
        few = parts * ceil(tiles / each) < FEW * device.sms
        if state < STATE and not (few and (rows, columns) != TILES[-1]):
            held = _held(each, rows * columns * shape.itemsize, HELD[tokens] - state)
            return DecodePlan(*sizes, tokens, rows, columns, each * columns, held, ahead)
    return None


def _held(tiles: int, size: int, room: int) -> int:
    """How many tiles of `size` bytes, of A and of B both, are held in so many bytes: one at least."""
    return max(1, min(tiles, room // (2 * size)))


def _power_of_two(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _up_to(n: int, multiple: int) -> int:
    return ceil(n / multiple) * multiple
