"""Inversion: a residual chain without norms can be run backwards, so its states need not be kept.

z_k = z_{k+1} - h_k B_k, as in RevNet (arXiv 1707.04585). Kept are the last state and what the steps read (p, of which
h = act(p) follows at no cost worth counting): d + K r a token and lane, for half a forward's FLOPs more, that is, 7/6
of plain training. In blocks (see lookahead.py) a whole block is taken back at once: Z_n = Z_{n+1} - H B_blk.
"""

import torch
from torch import Tensor

from ...triton_kernels import ACTIVATIONS, ChainWeights
from ...triton_kernels.reference import add_product
from .lookahead import block_gram, earlier, solve, solve_backward
from .steps import lanes_of, output, parts, read, refuse_gated


def inverted(x: Tensor, chain: ChainWeights, *, block: int = 0) -> Tensor:
    """The chain with a backward pass that rebuilds its states; arguments, result and errors as `chain_reference`'s.

    Args:
        x: The tokens, [..., d].
        chain: The weights, of plain steps.
        block: How wide a part is taken at once, by look-ahead: `block` / r steps, but one at least.
    """
    chain.check(x)
    refuse_gated(chain)
    A, B, scale, bias, _, act = chain
    y: Tensor = _Inverted.apply(
        x.reshape(-1, x.shape[-1]), A, B, scale, bias, act, max(1, block // A.shape[2])
    )
    return y.reshape(x.shape)


class _Inverted(torch.autograd.Function):
    """y [T, d] of x [T, d]; `steps` of the chain are taken at once."""

    @staticmethod
    def forward(ctx, x, A, B, scale, bias, act, steps):
        chain = ChainWeights(A, B, scale, bias, act=act)
        start = z = lanes_of(x, chain)
        rank, reads = A.shape[2], []
        for A_blk, B_blk in _blocks(chain, steps):
            gram = block_gram(A_blk, B_blk, rank)
            p, H = solve(read(z, A_blk), gram, act, rank)
            reads.append(p)
            z = add_product(z, H, B_blk)
        ctx.save_for_backward(z, A, B, scale, *reads)
        ctx.act, ctx.steps, ctx.dtype = act, steps, x.dtype
        return output(x, chain, start, z)

    @staticmethod
    def backward(ctx, dy):
        z, A, B, scale, *reads = ctx.saved_tensors
        rank, dy = A.shape[2], dy.to(z.dtype)
        dscale = (dy * z.sum(0)).sum(0)
        dz = (scale.to(z.dtype) * dy).expand_as(z)
        gradients = []
        for A_blk, B_blk in reversed(_blocks(ChainWeights(A, B, scale, scale), ctx.steps)):
            p = reads.pop()
            z, dz, *gradient = _back(z, dz, p, A_blk, B_blk, ctx.act, rank)
            gradients.append(gradient)
        dA, dB = (torch.cat(of[::-1], 1).view_as(A) for of in zip(*gradients, strict=True))
        # y has z - x of every lane, and z is x by now.
        dscale = (dscale - (dy * z.sum(0)).sum(0)).to(scale.dtype)
        dx = torch.addcmul(dz.sum(0), scale.to(z.dtype), dy, value=-len(A)).to(ctx.dtype)
        return dx, dA, dB, dscale, dy.sum(0).to(scale.dtype), None, None


def _blocks(chain: ChainWeights, steps: int) -> list[tuple[Tensor, Tensor]]:
    """A and B of each block, [L, m, d]."""
    return [(A.flatten(1, 2), B.flatten(1, 2)) for A, B in parts(chain, steps)]


def _back(
    z: Tensor, dz: Tensor, p: Tensor, A: Tensor, B: Tensor, act: str, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From after a block to before it: the state, its gradient, and those of A and B.

    p: what the steps read. With dgram = H^T dp where a step is before another, else 0:
    dA = dp^T Z + dgram^T B and dB = H^T dz + dgram A.
    """
    H, change = ACTIVATIONS[act](p), dz.to(B.dtype)
    z = add_product(z, H, B, sign=-1)
    state, gram = z.to(B.dtype), block_gram(A, B, rank)
    dp = solve_backward(p, gram, torch.bmm(change, B.mT), act, rank)
    dB = torch.bmm(H.mT, change)
    dA = torch.bmm(dp.mT, state)
    if H.shape[-1] > rank:
        dgram = torch.bmm(H.mT, dp) * earlier(B, rank)
        dA, dB = torch.baddbmm(dA, dgram.mT, B), torch.baddbmm(dB, dgram, A)
    return z, add_product(dz, dp, A), dA, dB
