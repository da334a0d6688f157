"""How a product is divided among programs, and what it should take so."""

from dataclasses import dataclass, replace
from functools import cache
from math import ceil

from .gpu import Device

FILLED = 0.68  # of the multiprocessors, which a product should give a program: 90 of 132
MOST_PARTS = 32  # of a sum


@dataclass(frozen=True, order=True, slots=True)
class Tile:
    """How a product is divided among programs."""

    rows: int  # tokens of a tile
    columns: int
    inner: int  # what is summed at a time
    split: int = 1  # programs that share the sum of a tile
    warps: int = 4
    stages: int = 3

    def programs(self, tokens: int, columns: int, lanes: int) -> int:
        """Programs of a product of `tokens` rows, in all lanes."""
        return self.tiles(tokens, columns) * self.split * lanes

    def tiles(self, tokens: int, columns: int) -> int:
        """Tiles of one lane's product."""
        return ceil(tokens / self.rows) * ceil(columns / self.columns)


@dataclass(frozen=True, slots=True)
class Work:
    """One product: [tokens, inner] times [inner, columns] in every lane.

    ends: bytes read and written for an element of the result. itemsize: bytes of an operand's element.
    """

    tokens: int
    columns: int
    inner: int
    lanes: int = 1
    ends: int = 4
    itemsize: int = 2

    @property
    def weight_bytes(self) -> int:
        return self.lanes * self.columns * self.inner * self.itemsize

    @property
    def flops(self) -> int:
        return 2 * self.lanes * self.tokens * self.columns * self.inner


@cache
def tile_for(work: Work, device: Device) -> Tile:
    """The tile that should be the fastest of those that give most multiprocessors a program.

    Of those that do not spill on sm_80, sm_90, sm_100 and gfx942. Where none is small enough, the most programs count.
    """
    # 128 by 256 would read less, but spills 700 bytes a thread where u is added and z written.
    rows = min(128, max(16, 1 << (work.tokens - 1).bit_length()))
    if work.itemsize == 4:  # no matrix units: small tiles
        return Tile(min(rows, 64), 64, 32, stages=2)
    low, wide = min(rows, 64), min(128, max(16, 1 << (work.columns - 1).bit_length()))
    sizes = {(rows, wide), *((low, width) for width in (64, 32, 16) if width <= wide)}
    tiles = []
    for BM, BN in sizes:
        whole = Tile(BM, BN, 64, warps=8 if BM == 128 else 4)
        chunks = ceil(work.inner / whole.inner)
        # As many parts as some number of chunks each makes, of tiles whose sums are small.
        parts = {ceil(chunks / each) for each in range(1, chunks + 1)} if BM * BN <= 4096 else {1}
        tiles += [replace(whole, split=split) for split in parts if split <= MOST_PARTS]
    wanted = ceil(FILLED * device.sms)

    def order(tile: Tile) -> tuple[int, float, Tile]:
        programs = tile.programs(work.tokens, work.columns, work.lanes)
        return -min(programs, wanted), product_seconds(work, tile, device), tile

    return min(tiles, key=order)


def product_seconds(work: Work, tile: Tile, device: Device) -> float:
    """What a launch of a product should take.

    A multiprocessor that has the most programs reads their operands, from L2 or through it, and does their products,
    at its share of the device's rates; or the weights, and a result too large for L2, come from and go to memory.
    Before all that the first operands are waited for, and after it what is added to the result.
    """
    most = ceil(tile.programs(work.tokens, work.columns, work.lanes) / device.sms)
    span = ceil(work.inner / (tile.inner * tile.split)) * tile.inner
    rows = min(tile.rows, work.tokens)  # what a mask leaves out is not read, but multiplied
    read = span * (rows + tile.columns) * work.itemsize
    ends = rows * tile.columns * work.ends
    parts = 0.0
    if (
        tile.split > 1
    ):  # a part is written by each, and all are read by the last, after their additions to a counter
        ends += rows * tile.columns * 4 * (1 + tile.split)
        parts = 3 * device.latency
    # Tiles of 64 columns read an operand from shared memory as often as half of the matrix units' rate allows.
    # Products in float32 have no such units.
    rate = device.flops / device.sms * (0.07 if work.itemsize == 4 else min(1.0, tile.columns / 128))
    busy = most * max((read + ends) / device.sm_bandwidth, 2 * tile.rows * tile.columns * span / rate)
    result = work.lanes * work.tokens * work.columns * work.ends
    moved = work.weight_bytes + (result if result > device.l2 / 2 else 0)
    return device.launch + 2 * device.latency + parts + max(busy, moved / device.bandwidth)
