"""The runtime's trick turned around: training in rounds of several steps.

Within a block of S steps (width m = S r) that starts at state Z, as in triton_kernels/lookahead.py,

    P      = Z A_blk^T                             gram[j, i] = B_j A_i^T for j before i
    p_i    = P_i + sum_{j<i} h_j gram[j, i]        h_i  = act(p_i)
    Z     += H B_blk

Backpropagation keeps one state a block, p and H: (K r / m) d + 2 K r a token and lane instead of K d + 2 K r. It
waits for two wide products a block instead of two thin ones a step, for about m / (4 d) more FLOPs.
"""

import torch
from torch import Tensor

from ...triton_kernels import ACTIVATIONS, ChainWeights
from ...triton_kernels.reference import add_product
from .checkpoint import checkpointed
from .steps import activation_backward, lanes_of, output, parts, read


def lookahead_trained(x: Tensor, chain: ChainWeights, *, block: int = 256, recompute: bool = False) -> Tensor:
    """The chain in blocks; arguments, result and errors as those of `chain_reference`.

    Args:
        x: The tokens, [..., d].
        chain: The weights, of plain steps.
        block: Width of a block, of `block` / r steps but one at least.
        recompute: Whether only the state at each block's start is kept, and the block is computed once more, for a
            third more FLOPs.
    """
    rank = chain.A.shape[2]
    start = z = lanes_of(x, chain)
    run = checkpointed(_block) if recompute else _block
    for A, B in parts(chain, max(1, block // rank)):
        z = run(z, rank, chain.act, A.flatten(1, 2), B.flatten(1, 2))
    return output(x, chain, start, z)


def _block(z: Tensor, rank: int, act: str, A: Tensor, B: Tensor) -> Tensor:
    """The state after a block: z [L, T, d], A and B [L, m, d]."""
    gram = block_gram(A, B, rank)
    return add_product(z, _Solve.apply(act, rank, read(z, A), gram), B)


def block_gram(A: Tensor, B: Tensor, rank: int) -> Tensor:
    """[L, m, m] for A and B [L, m, d]: B_j A_i^T where step j is before step i, else 0.

    Of a single step, which has none before it, an empty one, [L, 0, 0].
    """
    if B.shape[1] == rank:
        return B.new_empty(len(B), 0, 0)
    return torch.bmm(B, A.mT) * earlier(B, rank)


def earlier(B: Tensor, rank: int) -> Tensor:
    """[m, m] bool for B [L, m, d]: whether the row's step is before the column's."""
    step = torch.arange(B.shape[1], device=B.device) // rank
    return step[:, None] < step[None, :]


def solve(P: Tensor, gram: Tensor, act: str, rank: int) -> tuple[Tensor, Tensor]:
    """What each step of a block reads of its own state, and H.

    Args:
        P: What the steps read of the block's first state, [L, T, m].
        gram: The Gram block, [L, m, m].
        act: The activation.
        rank: Of a step.

    Returns:
        p and H = act(p), [L, T, m] each.
    """
    if P.shape[-1] == rank:
        return P, ACTIVATIONS[act](P)
    own, H = P.clone(), torch.empty_like(P)
    for first in range(0, H.shape[-1], rank):
        here = slice(first, first + rank)
        p = own[..., here]
        if first:
            p.baddbmm_(H[..., :first], gram[:, :first, here])
        H[..., here] = ACTIVATIONS[act](p)
    return own, H


def solve_backward(own: Tensor, gram: Tensor, dH: Tensor, act: str, rank: int) -> Tensor:
    """The gradient dP from dH, [L, T, m] each: the same solve, last step first.

    dh_j = dH_j + sum_{i>j} dp_i gram[j, i]^T. own: p, as `solve` gives it.
    """
    if dH.shape[-1] == rank:
        return activation_backward(own, act, dH)
    dH, dP, width = dH.clone(), torch.empty_like(own), dH.shape[-1]
    for first in reversed(range(0, width, rank)):
        here, after = slice(first, first + rank), slice(first + rank, width)
        if first + rank < width:
            dH[..., here].baddbmm_(dP[..., after], gram[:, here, after].mT)
        dp = activation_backward(own[..., here], act, dH[..., here])
        dP[..., here] = dp
    return dP


class _Solve(torch.autograd.Function):
    """H of `solve`."""

    @staticmethod
    def forward(ctx, act, rank, P, gram):
        own, H = solve(P, gram, act, rank)
        ctx.save_for_backward(H, own, gram)
        ctx.act, ctx.rank = act, rank
        return H

    @staticmethod
    def backward(ctx, dH):
        H, own, gram = ctx.saved_tensors
        dP = solve_backward(own, gram, dH, ctx.act, ctx.rank)
        # Of tiles that are not strictly earlier, `block_gram` takes no gradient.
        dgram = torch.bmm(H.mT, dP) if gram.numel() else torch.zeros_like(gram)
        return None, None, dP, dgram
