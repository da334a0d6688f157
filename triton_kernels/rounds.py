"""What a round of prefill consists of: products and solves, which `prefill.py` launches and `cost.py` counts."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil

from torch import Tensor

from .lookahead import SOLVED
from .tiles import Work

MOST_TOKENS = 8192  # from which on more tokens change nothing about tiles
SCRATCH = 256 * 2**20  # bytes at most: longer inputs go in chunks, 128 tokens at least


@dataclass(frozen=True, slots=True)
class Shape:
    """A DLR-Net on a number of tokens: A and B are [lanes, depth, rank, hidden] of `itemsize` bytes an element."""

    lanes: int
    depth: int  # steps a lane
    rank: int
    hidden: int
    tokens: int
    itemsize: int = 2

    @staticmethod
    def of(A: Tensor, tokens: int) -> "Shape":
        """The shape of a chain with weights like A [L, K, r, d]."""
        lanes, depth, rank, hidden = A.shape
        return Shape(lanes, depth, rank, hidden, tokens, A.itemsize)

    @property
    def weight_bytes(self) -> int:
        """Bytes of A and B."""
        return 2 * self.lanes * self.depth * self.rank * self.hidden * self.itemsize

    @property
    def flops(self) -> int:
        """FLOPs of the chain itself, two for a multiplication and addition."""
        return 2 * self.tokens * self.weight_bytes // self.itemsize


@dataclass(frozen=True, slots=True)
class Round:
    """One block of steps of every lane."""

    steps: int
    first: bool
    last: bool
    finishes: bool  # whether the last product writes y; else the lanes are still to be summed
    project: Work
    solved: bool  # several steps by one solve; else an activation ends a product for each
    between: tuple[Work, ...]  # what earlier steps add to the second one's P, to the third one's, and so on
    update: Work

    def works(self) -> list[Work]:
        """Its products."""
        return [self.project, *self.between, self.update]


@cache
def round_of(shape: Shape, steps: int, first: bool, last: bool) -> Round:
    """The round of a block of `steps` steps."""
    lanes, rank, hidden, size = shape.lanes, shape.rank, shape.hidden, shape.itemsize
    tokens, columns = shape.tokens, steps * rank
    solved = steps > 1 and rank <= SOLVED
    # Of a step that follows others P is read and H written.
    later = range(1, 1 if solved else steps)
    between = tuple(Work(tokens, rank, i * rank, lanes, rank, 4 + size, size) for i in later)
    active = 0 if solved else rank
    written = ceil((active * size + (columns - active) * 4) / columns)
    project = Work(tokens, columns, hidden, lanes, active, written, size)
    finishes = last and (lanes == 1 or first)
    if finishes and first:  # the sum over lanes is one product
        update = Work(tokens, hidden, lanes * columns, ends=size, itemsize=size)
    else:  # reads the state but in the first round, and x in the first and the last
        read = size if first else 4 + size if last else 4
        ends = read + (size if finishes else 4 if last else 4 + size)
        update = Work(tokens, hidden, columns, lanes, ends=ends, itemsize=size)
    return Round(steps, first, last, finishes, project, solved, between, update)


def rounds_of(shape: Shape, block: int) -> Iterator[Round]:
    """The rounds of a chain whose Gram blocks have `block` steps."""
    count = ceil(shape.depth / block)
    for n in range(count):
        steps = block if n < count - 1 else shape.depth - n * block
        yield round_of(shape, steps, n == 0, n == count - 1)


def class_tokens(tokens: int) -> int:
    """The number of tokens for which the tiles of a call of `tokens` are chosen, so that launches are made once.

    The most of those that have as many tiles of 16 or, beyond 256 tokens, of 64 rows.
    """
    tokens = min(tokens, MOST_TOKENS)
    step = 16 if tokens <= 256 else 64
    return -(-tokens // step) * step


def chunk_tokens(shape: Shape, width: int, *, scratch: int = SCRATCH) -> int:
    """Tokens of a chunk whose state, P and H take at most `scratch` bytes: a multiple of 128, and at least 128.

    Args:
        shape: The chain.
        width: Columns of a Gram block.
        scratch: Bytes of temporary memory.
    """
    each = shape.lanes * (shape.hidden + width) * (4 + shape.itemsize)
    return max(128, scratch // each // 128 * 128)
