"""How a product is divided among programs, and what it should take so."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
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
    registers: int = 0  # of a thread, at most; 0: as the compiler likes

    @property
    def ends(self) -> int:
        """The parts, a power of two, in which a tile is finished: of 16 values a thread."""
        return max(1, self.rows * self.columns // (512 * self.warps))

    def tiles(self, tokens: int, columns: int, active: int = 0) -> int:
        """Tiles of one lane's product of `tokens` rows. active: the first columns, that no tile has beside others."""
        across = ceil(active / self.columns) + ceil((columns - active) / self.columns)
        return ceil(tokens / self.rows) * across


@dataclass(frozen=True, slots=True)
class Work:
    """One product: [tokens, inner] times [inner, columns] in every lane.

    active: the first columns, which an activation ends. ends: bytes read and written for an element of the result.
    itemsize: bytes of an operand's element.
    """

    tokens: int
    columns: int
    inner: int
    lanes: int = 1
    active: int = 0
    ends: int = 4
    itemsize: int = 2

    def programs(self, tile: Tile, tokens: int | None = None) -> int:
        """Programs of the product in all lanes, in such tiles, of `tokens` rows, or its own number."""
        return tile.tiles(tokens or self.tokens, self.columns, self.active) * tile.split * self.lanes

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
    rows = min(128, max(16, 1 << (work.tokens - 1).bit_length()))
    if work.itemsize == 4:  # no matrix units: small tiles
        return Tile(min(rows, 64), 64, 32, stages=2)
    widest = max(16, 1 << (work.columns - 1).bit_length())
    tiles = []
    for BM, BN in product({rows, min(rows, 64)}, (256, 128, 64, 32, 16)):
        # Columns too wide for the product, or, beside so many rows, for the device; or a tile that reads too much.
        if widest < BN or (BN == 256 and (BM < 128 or not device.wide_tiles)) or (BM == 128 and BN < 64):
            continue
        # With 4 warps 64 by 128 takes 160 registers, and spills 8 bytes on sm_100.
        whole = Tile(BM, BN, 64, warps=8 if BM * BN >= 8192 else 4)
        chunks = ceil(work.inner / whole.inner)
        # As many parts as some number of chunks each makes, of tiles whose sums are small.
        parts = {ceil(chunks / each) for each in range(1, chunks + 1)} if BM * BN <= 16384 else {1}
        tiles += [replace(whole, split=split) for split in parts if split <= MOST_PARTS]
    if (
        device.registers
    ):  # 128 leave room for two programs of 8 warps; of a split sum there is rarely a second
        tiles = [
            replace(t, registers=128 if t.warps == 8 and t.split == 1 and t.ends == 2 else 255) for t in tiles
        ]
    wanted = ceil(FILLED * device.sms)

    def order(tile: Tile) -> tuple[int, float, Tile]:
        return -min(work.programs(tile), wanted), product_seconds(work, tile, device), tile

    return min(tiles, key=order)


def product_seconds(work: Work, tile: Tile, device: Device) -> float:
    """What a launch of a product should take.

    A multiprocessor that has the most programs reads their operands, from L2 or through it, and does their products,
    at its share of the device's rates; or the weights, and a result too large for L2, come from and go to memory.
    Before all that the first operands are waited for, and after it what is added to the result.
    """
    most = ceil(work.programs(tile) / device.sms)
    span = ceil(work.inner / (tile.inner * tile.split)) * tile.inner
    rows = min(tile.rows, work.tokens)  # what a mask leaves out is not read, but multiplied
    read = span * (rows + tile.columns) * work.itemsize
    ends = rows * tile.columns * work.ends
    parts = 0.0
    result = work.lanes * work.tokens * work.columns * work.ends
    if tile.split > 1:
        # A part is written by each, and all are read by the last, after their additions to a counter.
        ends += rows * tile.columns * 4 * (1 + tile.split)
        result += 8 * work.programs(tile) * rows * tile.columns
        parts = 3 * device.latency
    # Tiles of 64 columns read an operand from shared memory as often as half of the matrix units' rate allows.
    # Products in float32 have no such units.
    rate = device.flops / device.sms * (0.07 if work.itemsize == 4 else min(1.0, tile.columns / 128))
    busy = most * max((read + ends) / device.sm_bandwidth, 2 * tile.rows * tile.columns * span / rate)
    moved = work.weight_bytes + (result if result > device.l2 / 2 else 0)
    return device.launch + 2 * device.latency + parts + max(busy, moved / device.bandwidth)
