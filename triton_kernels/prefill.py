"""Many tokens at once: rounds of three launches, or one round where a lane fits one block.

A round is P = z A^T, the solve of its block, and u += H B with u = z - x, the sum of a lane's updates, kept in float32.
Where a block is one step, there is nothing to solve: H = act(z A^T) is one launch, two make a round, and P is
never in memory.

Holding u instead of z spares the copy of x at the start and the subtraction at the end, and the products read
z = x + u rounded to the weights' dtype, which the second product writes on its way.
"""

import torch
from torch import Tensor

from .chain import ChainWeights
from .cost import solve_columns
from .lookahead import block_steps, wide
from .matmul import matmul
from .solve import block_solve

SCRATCH = 256 * 2**20  # bytes at most: longer inputs go in chunks, 128 tokens at least


def prefill(x: Tensor, chain: ChainWeights, gram: Tensor, *, scratch: int = SCRATCH) -> Tensor:
    """The output of a DLR-Net of plain steps for many tokens.

    Args:
        x: The tokens, [T, d], of any float dtype, rows contiguous.
        chain: The weights: A and B float32, bfloat16 or float16, scale and bias float32, all contiguous; an activation
            of KERNEL_ACTS.
        gram: What `gram_blocks` gave for these weights.
        scratch: Bytes of temporary memory, freed on return; where that is less than 128 tokens need, they get it.

    Returns:
        y, [T, d], in x's dtype.
    """
    y = torch.empty_like(x)
    size = chunk_tokens(chain.A.shape, gram.shape[-2], itemsize=chain.A.itemsize, scratch=scratch)
    for part, out in zip(x.split(size), y.split(size), strict=True):
        _prefill_chunk(part, chain, gram, out)
    return y


def chunk_tokens(
    shape: torch.Size | tuple[int, ...], width: int, *, itemsize: int, scratch: int = SCRATCH
) -> int:
    """Tokens of a chunk whose state, P and H take at most `scratch` bytes: a multiple of 128, and at least 128.

    Args:
        shape: Of A, [L, K, r, d].
        width: Columns of a Gram block.
        itemsize: Bytes of an element of the weights.
        scratch: Bytes of temporary memory.
    """
    lanes, _, _, hidden = shape
    each = lanes * (hidden * (4 + itemsize) + width * (4 + itemsize))
    return max(128, scratch // each // 128 * 128)


def _prefill_chunk(x: Tensor, chain: ChainWeights, gram: Tensor, y: Tensor) -> None:
    A, B, scale, bias, _, act = chain
    lanes, depth, rank, hidden = A.shape
    tokens, one_round = len(x), gram.shape[1] == 1
    steps = block_steps(gram.shape[-2], depth, rank)
    x = x.contiguous()
    z = x.expand(lanes, -1, -1)  # the matmul rounds it to the weights' dtype
    u: Tensor | None = None
    for n, first in enumerate(range(0, depth, steps)):
        read = slice(first, first + steps)
        width = min(steps, depth - first) * rank
        # A token's lanes side by side: in a single round all of them read x, in one product, and the sum over
        # lanes is one product of L m columns.
        H = x.new_empty(tokens, lanes, width, dtype=A.dtype)
        alone = width == rank
        P = H if alone else x.new_empty(H.shape, dtype=torch.float32)
        if one_round:
            a, W, out = x[None], A.reshape(1, -1, hidden), P.flatten(1)[None]
        else:
            a, W, out = z, wide(A[:, read]), P.transpose(0, 1)
        matmul(a, W.mT, out, act=act if alone else None)
        if not alone:
            _solve_block(P.transpose(0, 1), gram[:, n], rank, act, H.transpose(0, 1))
        if one_round:
            matmul(H.flatten(1)[None], B.reshape(1, -1, hidden), y[None], finish=(scale, bias))
            return
        H, B_blk = H.transpose(0, 1), wide(B[:, read])
        if first + steps < depth:
            following = x.new_empty(lanes, tokens, hidden, dtype=A.dtype) if n == 0 else z
            total = x.new_empty(lanes, tokens, hidden, dtype=torch.float32) if u is None else u
            matmul(H, B_blk, total, total=u, state=(x, following))
            u, z = total, following
        elif lanes == 1:
            matmul(H, B_blk, y[None], total=u, finish=(scale, bias))
        else:
            assert u is not None
            matmul(H, B_blk, u, total=u)
            y.copy_(scale * u.sum(0) + bias)


def _solve_block(P: Tensor, gram: Tensor, rank: int, act: str, H: Tensor) -> None:
    """H [L, T, m] of a block, for P [L, T, m], which is overwritten; gram [L, m', m'], m' >= m.

    A block wider than one solve is solved in parts; what a part adds to the P of the later ones is a product.
    """
    width = H.shape[-1]
    part = solve_columns(width, rank)
    for first in range(0, width, part):
        own, rest = slice(first, first + part), slice(first + part, width)
        h = block_solve(P[..., own], gram[:, own, own], rank, act, out=H[..., own])
        if rest.start < width:
            matmul(h, gram[:, own, rest], P[..., rest], total=P[..., rest])
