"""Many tokens at once: rounds of a few launches, or one round where a lane fits one block.

A round is P = z A^T, the hidden units H of its block, and u += H B with u = z - x, the sum of a lane's updates, kept in
float32. H follows from P in parts: a part of several narrow steps is a solve; of a part that is one wide step nothing
is left but the activation, with which its product ends. What earlier parts add to the P of a later one is a product.

Holding u instead of z spares the copy of x at the start and the subtraction at the end, and the products read
z = x + u rounded to the weights' dtype, which the second product writes on its way. In memory a token's lanes lie side
by side, so that no stride depends on the number of tokens.
"""

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from .chain import ChainWeights
from .cost import Device, Shape, solve_columns
from .matmul import Product, View, matmul_memory, tile_for
from .solve import Solve

MOST_TOKENS = 8192  # from which on more tokens change nothing about tiles
SCRATCH = 256 * 2**20  # bytes at most: longer inputs go in chunks, 128 tokens at least


def prefill(
    x: Tensor, chain: ChainWeights, gram: Tensor, device: Device, *, scratch: int = SCRATCH
) -> Tensor:
    """The output of a DLR-Net of plain steps for many tokens.

    Args:
        x: The tokens, [T, d], of any float dtype, contiguous.
        chain: The weights: A and B float32, bfloat16 or float16, scale and bias float32, all contiguous; an activation
            of KERNEL_ACTS. Like x and `gram`, they begin at multiples of 16 bytes, as what torch allocates does.
        gram: What `gram_blocks` gave for these weights.
        device: The GPU.
        scratch: Bytes of temporary memory, freed on return; where that is less than 128 tokens need, they get it.

    Returns:
        y, [T, d], in x's dtype.
    """
    A = chain.A
    # Tiles are chosen for the power of two below: all its programs are there for every T up to the next.
    tokens = min(MOST_TOKENS, 1 << len(x).bit_length() - 1)
    steps = gram.shape[-2] // A.shape[2]
    made = _made(Shape.of(A, tokens), steps, A.dtype, chain.act, device, scratch, x.dtype, x.device)
    return made(x, chain, gram)


@lru_cache(maxsize=256)
def _made(
    shape: Shape, steps: int, dtype: torch.dtype, act: str, device: Device, scratch: int, *_: object
) -> "Prefill":
    """The launches, of their own for each dtype of x and each device: see `Launch`."""
    return Prefill(shape, steps, dtype, act, device, scratch=scratch)


class Prefill:
    """The launches of a chain of plain steps on many tokens, made once for all calls of about as many tokens."""

    def __init__(
        self,
        shape: Shape,
        steps: int,
        dtype: torch.dtype,
        act: str,
        device: Device,
        *,
        scratch: int = SCRATCH,
    ) -> None:
        """Args:
        shape: The chain, and about how many tokens a call has, by which tiles are chosen.
        steps: Of a Gram block.
        dtype: Of the weights: float32, bfloat16 or float16.
        act: One of KERNEL_ACTS.
        device: The GPU.
        scratch: Bytes of temporary memory, freed on return; where that is less than 128 tokens need, they get it.
        """
        self._shape, self._steps = shape, steps
        self._width = steps * shape.rank
        self._chunk = chunk_tokens(shape, self._width, scratch=scratch)
        self._rounds = _rounds(shape, steps, dtype, act, device, min(shape.tokens, self._chunk))
        self._products = list({p: None for r in self._rounds for p in r.products()})

    def __call__(self, x: Tensor, chain: ChainWeights, gram: Tensor) -> Tensor:
        """y of `prefill`."""
        y = torch.empty_like(x)
        if len(x) <= self._chunk:
            self._run(x, chain, gram, y)
        else:
            for part, out in zip(x.split(self._chunk), y.split(self._chunk), strict=True):
                self._run(part, chain, gram, out)
        return y

    def _run(self, x: Tensor, chain: ChainWeights, gram: Tensor, y: Tensor) -> None:
        lanes, hidden, tokens = self._shape.lanes, self._shape.hidden, len(x)
        A, B, scale, bias, *_ = chain
        H = x.new_empty(tokens, lanes, self._width, dtype=A.dtype)
        P = H if self._steps == 1 else x.new_empty(H.shape, dtype=torch.float32)
        u, z = None, x  # in the first round a token's x is its state
        if len(self._rounds) > 1:
            u = x.new_empty(tokens, lanes, hidden, dtype=torch.float32)
            z = x.new_empty(u.shape, dtype=A.dtype)
        memory = matmul_memory(self._products, tokens, x.device)
        last = len(self._rounds) - 1
        for n, one in enumerate(self._rounds):
            one.project(tokens, n, x if n == 0 else z, A, P, hidden=H, **memory)
            for between, solve in one.parts:
                if between is not None:
                    between(tokens, n, H, gram, P, hidden=H, total=P, **memory)
                if solve is not None:
                    solve(tokens, n, P, gram, H)
            if n < last:
                one.update(tokens, n, H, B, u, x=x, z=z, total=u, **memory)
            elif one.finishes:
                one.update(tokens, n, H, B, y, scale=scale, bias=bias, total=u, **memory)
            else:
                one.update(tokens, n, H, B, u, total=u, **memory)
                assert u is not None
                y.copy_(scale * u.sum(1) + bias)


class _Round:
    """The launches of one round: of a block of `steps` steps in every lane, the last of the chain or another."""

    def __init__(
        self,
        shape: Shape,
        block: int,
        steps: int,
        dtype: torch.dtype,
        act: str,
        device: Device,
        tokens: int,
        *,
        first: bool,
        last: bool,
    ) -> None:
        lanes, rank, hidden = shape.lanes, shape.rank, shape.hidden
        width, blocks = block * rank, -(-shape.depth // block)
        size = solve_columns(width, rank) // rank  # steps of a part
        one_round = first and last
        self.finishes = last and (lanes == 1 or one_round)
        token = View(lanes * width, lane=width)  # of P and H
        state = View(lanes * hidden, lane=hidden)  # of u and z
        whole = shape.depth * rank * hidden  # elements of a lane's A
        gram_lane, gram_block = blocks * width**2, width**2

        def product(columns: int, inner: int, lanes: int = lanes, **views: Any) -> Product:
            tile = tile_for(tokens, columns, inner, lanes, dtype, device.sms)
            return Product(lanes=lanes, columns=columns, inner=inner, tile=tile, act=act, **views)

        # A token's x is read by every lane.
        self.project = product(
            steps * rank, hidden, a=View(hidden) if first else state,
            w=View(1, column=hidden, lane=whole, block=width * hidden), out=token,
            active=rank if size == 1 else 0,
        )  # fmt: skip
        self.parts: list[tuple[Product | None, Solve | None]] = []
        for start in range(0, steps, size):
            count = min(size, steps - start)
            between = solve = None
            if start:
                between = product(
                    count * rank, start * rank, a=token,
                    w=View(width, start=start * rank, lane=gram_lane, block=gram_block),
                    out=View(token.row, lane=width, start=start * rank), total=True,
                    active=rank if size == 1 else 0,
                )  # fmt: skip
            if size > 1:
                solve = Solve(
                    lanes=lanes, steps=count, rank=rank, first=start, block=block, blocks=blocks, tokens=tokens,
                    dtype=dtype, act=act,
                )  # fmt: skip
            self.parts.append((between, solve))
        written = View(hidden, lane=whole, block=width * hidden)
        if one_round:  # the sum over lanes is one product of L m columns
            self.update = product(
                hidden, lanes * width, lanes=1, a=View(lanes * width), w=View(hidden), out=View(hidden), finish=True
            )  # fmt: skip
        else:
            self.update = product(
                hidden, steps * rank, a=token, w=written, out=View(hidden) if self.finishes else state,
                z=None if last else state, total=not first, finish=self.finishes,
            )  # fmt: skip

    def products(self) -> list[Product]:
        """All but the solves."""
        return [self.project, self.update, *(between for between, _ in self.parts if between)]


def _rounds(
    shape: Shape, block: int, dtype: torch.dtype, act: str, device: Device, tokens: int
) -> list[_Round]:
    """The rounds of a chain; those in the middle are one."""
    count = -(-shape.depth // block)
    left = shape.depth - (count - 1) * block

    @cache
    def one(steps: int, first: bool, last: bool) -> _Round:
        return _Round(shape, block, steps, dtype, act, device, tokens, first=first, last=last)

    return [one(left if n == count - 1 else block, n == 0, n == count - 1) for n in range(count)]


def chunk_tokens(shape: Shape, width: int, *, scratch: int = SCRATCH) -> int:
    """Tokens of a chunk whose state, P and H take at most `scratch` bytes: a multiple of 128, and at least 128.

    Args:
        shape: The chain.
        width: Columns of a Gram block.
        scratch: Bytes of temporary memory.
    """
    each = shape.lanes * (shape.hidden + width) * (4 + shape.itemsize)
    return max(128, scratch // each // 128 * 128)
