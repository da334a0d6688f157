"""Inversion: a residual chain without norms can be run backwards, so its states need not be kept.

z_k = z_{k+1} - h_k B_k, as in RevNet (arXiv 1707.04585). Kept are the last state and what the steps read (p, of which
h = act(p) follows at no cost worth counting): d + K r a token and lane, for half a forward's FLOPs more, that is, 7/6
of plain training. In blocks (see lookahead.py) a whole block is taken back at once: Z_n = Z_{n+1} - H B_blk.
"""

import torch
from torch import Tensor

from ...triton_kernels import ChainWeights
from ...triton_kernels.reference import add_product
from .lookahead import block_gram, earlier, solve, solve_backward
from .steps import hidden, lanes_of, output, parts, read


def inverted(x: Tensor, chain: ChainWeights, *, block: int = 0) -> Tensor:
    """The chain with a backward pass that rebuilds its states; arguments and result as `chain_reference`'s.

    block: take `block` / r steps at once, by look-ahead, but one at least.
    """
    chain.check(x)
    y: Tensor = _Inverted.apply(x.reshape(-1, x.shape[-1]), *chain, max(1, block // chain.A.shape[2]))
    return y.reshape(x.shape)


@torch.no_grad()
def rebuild_error(x: Tensor, chain: ChainWeights, *, state: torch.dtype) -> float:
    """How far x, rebuilt from the chain's end in a state of dtype `state`, is from x: the RMS ratio, in all lanes.

    What the steps read is kept in the weights' dtype, and is the same both ways: the error is that of adding and
    subtracting, one rounding of the state a step and way.
    """
    start = z = lanes_of(x, chain).to(state)
    updates = []
    for B_k, *readers in _blocks(chain, 1):
        updates.append(torch.bmm(hidden(read(z, readers), chain.act), B_k).to(state))
        z = z + updates[-1]
    for update in reversed(updates):
        z = z - update
    start, z = start.double(), z.double()
    return ((z - start).square().mean() / start.square().mean()).sqrt().item()


class _Inverted(torch.autograd.Function):
    """y [T, d] of x [T, d]; `steps` of the chain are taken at once."""

    @staticmethod
    def forward(ctx, x, A, B, scale, bias, G, act, steps):
        chain = ChainWeights(A, B, scale, bias, G, act)
        start = z = lanes_of(x, chain)
        rank, reads = A.shape[2], []
        for B_blk, *readers in _blocks(chain, steps):
            grams = [block_gram(B_blk, W, rank) for W in readers]
            own, H = solve(read(z, readers), grams, act, rank)
            reads += own
            z = add_product(z, H, B_blk)
        ctx.save_for_backward(z, A, B, G, scale, *reads)
        ctx.act, ctx.steps, ctx.dtype = act, steps, x.dtype
        return output(x, chain, start, z)

    @staticmethod
    def backward(ctx, dy):
        z, A, B, G, scale, *reads = ctx.saved_tensors
        rank, dy = A.shape[2], dy.to(z.dtype)
        dscale = (dy * z.sum(0)).sum(0)
        dz = (scale.to(z.dtype) * dy).expand_as(z)
        gradients = []
        for weights in reversed(_blocks(ChainWeights(A, B, scale, scale, G), ctx.steps)):
            own = [reads.pop() for _ in weights[1:]][::-1]
            z, dz, gradient = _back(z, dz, own, weights, ctx.act, rank)
            gradients.append(gradient)
        dB, dA, *dG = (torch.cat(of[::-1], 1).view_as(A) for of in zip(*gradients, strict=True))
        # y has z - x of every lane, and z is x by now.
        dscale = (dscale - (dy * z.sum(0)).sum(0)).to(scale.dtype)
        dx = torch.addcmul(dz.sum(0), scale.to(z.dtype), dy, value=-len(A)).to(ctx.dtype)
        return dx, dA, dB, dscale, dy.sum(0).to(scale.dtype), *(dG or (None,)), None, None


def _blocks(chain: ChainWeights, steps: int) -> list[list[Tensor]]:
    """B and the readers of each block, [L, m, d]."""
    return [[W.flatten(1, 2) for W in part] for part in parts(chain, steps)]


def _back(
    z: Tensor, dz: Tensor, own: list[Tensor], weights: list[Tensor], act: str, rank: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """From after a block to before it: the state, its gradient, and those of the weights B, A and, gated, G.

    own: what the steps read. With dgram = H^T dp where a step is before another, else 0:
    dA = dp^T Z + dgram^T B and dB = H^T dz + dgram A.
    """
    B, *readers = weights
    H, change = hidden(own, act), dz.to(B.dtype)
    z = add_product(z, H, B, sign=-1)
    state = z.to(B.dtype)
    grams = [block_gram(B, W, rank) for W in readers]
    reads = solve_backward(own, grams, torch.bmm(change, B.mT), act, rank)
    dB, gradients = torch.bmm(H.mT, change), []
    for dp, W in zip(reads, readers, strict=True):
        dW = torch.bmm(dp.mT, state)
        if H.shape[-1] > rank:
            dgram = torch.bmm(H.mT, dp) * earlier(B, rank)
            dW, dB = torch.baddbmm(dW, dgram.mT, B), torch.baddbmm(dB, dgram, W)
        dz = add_product(dz, dp, W)
        gradients.append(dW)
    return z, dz, [dB, *gradients]
