"""Many tokens at once: rounds of a few launches, or one round where a lane fits one block.

A round is P = z A^T, the hidden units H of its block, and z += H B, the state, kept in float32. Of narrow steps H
follows from P by a solve. Of the first of some wide steps nothing is left but the activation, with which the product of
P ends; what earlier ones add to the P of a later one is a product that ends so, too.

The products read z rounded to the weights' dtype, which the last product of the round before writes on its way; x is
added to the first round's sum and taken off the last one's. In memory a token's lanes lie side by side, so that no
stride depends on the number of tokens.
"""

from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from .chain import ChainWeights
from .gpu import Device
from .lookahead import gram_steps
from .matmul import Product, View, matmul_memory
from .rounds import SCRATCH, Round, Shape, chunk_tokens, class_tokens, rounds_of
from .solve import Solve
from .tiles import Work, tile_for


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
    made = _made(
        Shape.of(A, class_tokens(len(x))),
        gram_steps(gram),
        A.dtype,
        chain.act,
        device,
        scratch,
        x.dtype,
        x.device,
    )
    return made(x, chain, gram)


@lru_cache(maxsize=1024)  # 140 for a chain that sees every number of tokens
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
        shape = replace(shape, tokens=min(shape.tokens, self._chunk))

        @cache  # those in the middle are one
        def made(one: Round) -> _Round:
            return _Round(shape, steps, one, dtype, act, device)

        self._rounds = [made(one) for one in rounds_of(shape, steps)]
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
        state, z = None, x  # in the first round a token's x is its state
        if len(self._rounds) > 1:
            state = x.new_empty(tokens, lanes, hidden, dtype=torch.float32)
            z = x.new_empty(state.shape, dtype=A.dtype)
        memory = matmul_memory(self._products, tokens, x.device)
        last = len(self._rounds) - 1
        for n, one in enumerate(self._rounds):
            one.project(tokens, n, x if n == 0 else z, A, P, hidden=H, **memory)
            if one.solve is not None:
                one.solve(tokens, n, P, gram, H)
            for between in one.between:
                between(tokens, n, H, gram, P, hidden=H, total=P, **memory)
            if n < last:
                one.update(tokens, n, H, B, state, x=x, z=z, total=state, **memory)
            elif one.finishes:
                one.update(tokens, n, H, B, y, x=x, scale=scale, bias=bias, total=state, **memory)
            else:
                one.update(tokens, n, H, B, state, x=x, total=state, **memory)
                assert state is not None
                y.copy_(scale * state.sum(1) + bias)


class _Round:
    """The launches of one round."""

    def __init__(
        self, shape: Shape, block: int, one: Round, dtype: torch.dtype, act: str, device: Device
    ) -> None:
        lanes, rank, hidden = shape.lanes, shape.rank, shape.hidden
        width, blocks = block * rank, -(-shape.depth // block)
        gram_block = block * (block - 1) // 2 * rank**2  # elements of a Gram block
        self.finishes = one.finishes
        token = View(lanes * width, lane=width)  # of P and H
        state = View(lanes * hidden, lane=hidden)  # of the state in both dtypes
        whole = shape.depth * rank * hidden  # elements of a lane's A

        def product(work: Work, **views: Any) -> Product:
            return Product(
                lanes=work.lanes,
                columns=work.columns,
                inner=work.inner,
                tile=tile_for(work, device),
                act=act,
                **views,
            )

        # A token's x is read by every lane.
        self.project = product(
            one.project, a=View(hidden) if one.first else state,
            w=View(1, column=hidden, lane=whole, block=width * hidden), out=token,
            active=0 if one.solved else rank,
        )  # fmt: skip
        self.between = [
            product(
                work, a=token,
                w=View(rank, start=i * (i - 1) // 2 * rank**2, lane=blocks * gram_block, block=gram_block),
                out=View(token.row, lane=width, start=i * rank), total=True, active=rank,
            )
            for i, work in enumerate(one.between, 1)
        ]  # fmt: skip
        self.solve = None
        if one.solved:
            self.solve = Solve(
                lanes=lanes, steps=one.steps, rank=rank, block=block, blocks=blocks, tokens=shape.tokens,
                dtype=dtype, act=act,
            )  # fmt: skip
        if one.first and one.last:  # the sum over lanes is one product of L m columns
            self.update = product(
                one.update, a=View(lanes * width), w=View(hidden), out=View(hidden), finish=True
            )
        else:
            self.update = product(
                one.update, a=token, w=View(hidden, lane=whole, block=width * hidden),
                out=View(hidden) if self.finishes else state,
                z=None if one.last else state, total=not one.first, x=one.first - one.last, finish=self.finishes,
            )  # fmt: skip

    def products(self) -> list[Product]:
        """All but the solves."""
        return [self.project, *self.between, self.update]
