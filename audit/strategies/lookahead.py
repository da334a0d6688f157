"""The runtime's trick turned around: training in rounds of several steps.

Within a block of S steps (width m = S r) that starts at state Z, as in triton_kernels/lookahead.py,

    P      = Z A_blk^T                             gram[j, i] = B_j A_i^T for j before i
    p_i    = P_i + sum_{j<i} h_j gram[j, i]        h_i  = act(p_i)
    Z     += H B_blk

Backpropagation keeps one state a block, p and H: (K r / m) d + 2 K r a token and lane instead of K d + 2 K r. It
waits for two wide products a block instead of two thin ones a step, for about m / (4 d) more FLOPs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...triton_kernels import ChainWeights
from ...triton_kernels.reference import add_product
from .checkpoint import checkpointed
from .steps import hidden, hidden_backward, lanes_of, output, parts, read


def lookahead_trained(x: Tensor, chain: ChainWeights, *, block: int = 256, recompute: bool = False) -> Tensor:
    """The chain in blocks of `block` / r steps, but one at least; arguments and result as `chain_reference`'s.

    recompute: keep the state at each block's start only, and compute the block once more, for a third more FLOPs.
    """
    rank = chain.A.shape[2]
    start = z = lanes_of(x, chain)
    run = checkpointed(_block) if recompute else _block
    for part in parts(chain, max(1, block // rank)):
        z = run(z, rank, chain.act, *(W.flatten(1, 2) for W in part))
    return output(x, chain, start, z)


def _block(z: Tensor, rank: int, act: str, B: Tensor, *readers: Tensor) -> Tensor:
    """The state after a block: z [L, T, d], B and readers [L, m, d]."""
    grams = [block_gram(B, W, rank) for W in readers]
    return add_product(z, _Solve.apply(act, rank, *read(z, readers), *grams), B)


def block_gram(B: Tensor, reader: Tensor, rank: int) -> Tensor:
    """[L, m, m] for B and a reader [L, m, d]: B_j reader_i^T where step j is before step i, else 0.

    Of a single step, which has none before it, an empty one, [L, 0, 0].
    """
    if B.shape[1] == rank:
        return B.new_empty(len(B), 0, 0)
    return torch.bmm(B, reader.mT) * earlier(B, rank)


def earlier(B: Tensor, rank: int) -> Tensor:
    """[m, m] bool for B [L, m, d]: whether the row's step is before the column's."""
    step = torch.arange(B.shape[1], device=B.device) // rank
    return step[:, None] < step[None, :]


def solve(
    reads: Sequence[Tensor], grams: Sequence[Tensor], act: str, rank: int
) -> tuple[list[Tensor], Tensor]:
    """From what the readers read of a block's first state, P or P and Q [L, T, m], and their Gram blocks [L, m, m]:
    what each step reads of its own state, likewise, and H [L, T, m]."""
    if reads[0].shape[-1] == rank:
        return list(reads), hidden(reads, act)
    own, H = [P.clone() for P in reads], torch.empty_like(reads[0])
    for first in range(0, H.shape[-1], rank):
        here = slice(first, first + rank)
        if first:
            for p, gram in zip(own, grams, strict=True):
                p[..., here].baddbmm_(H[..., :first], gram[:, :first, here])
        H[..., here] = hidden([p[..., here] for p in own], act)
    return own, H


def solve_backward(
    own: Sequence[Tensor], grams: Sequence[Tensor], dH: Tensor, act: str, rank: int
) -> list[Tensor]:
    """Gradients of what was read, dP or dP and dQ, from that of H: the same solve, last step first.

    dh_j = dH_j + sum_{i>j} dp_i gram[j, i]^T, and likewise what comes by way of q.
    """
    if dH.shape[-1] == rank:
        return list(hidden_backward(own, act, dH))
    dH, gradients, width = dH.clone(), [torch.empty_like(p) for p in own], dH.shape[-1]
    for first in reversed(range(0, width, rank)):
        here, after = slice(first, first + rank), slice(first + rank, width)
        if first + rank < width:
            for dp, gram in zip(gradients, grams, strict=True):
                dH[..., here].baddbmm_(dp[..., after], gram[:, here, after].mT)
        mine = hidden_backward([p[..., here] for p in own], act, dH[..., here])
        for dp, value in zip(gradients, mine, strict=True):
            dp[..., here] = value
    return gradients


class _Solve(torch.autograd.Function):
    """H of `solve`. Arguments: act, rank, what was read (one or two), Gram blocks (as many)."""

    @staticmethod
    def forward(ctx, act, rank, *tensors):
        grams = tensors[len(tensors) // 2 :]
        own, H = solve(tensors[: len(grams)], grams, act, rank)
        ctx.save_for_backward(H, *own, *grams)
        ctx.act, ctx.rank = act, rank
        return H

    @staticmethod
    def backward(ctx, dH):
        H, *tensors = ctx.saved_tensors
        own, grams = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        reads = solve_backward(own, grams, dH, ctx.act, ctx.rank)
        several = grams[0].numel() > 0
        # Of tiles that are not strictly earlier, `block_gram` takes no gradient.
        dgrams = [
            torch.bmm(H.mT, dp) if several else torch.zeros_like(g)
            for dp, g in zip(reads, grams, strict=True)
        ]
        return None, None, *reads, *dgrams
