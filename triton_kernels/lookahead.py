"""Look-ahead: the same chain in rounds of several steps, in plain torch.

Within a block of S steps (width m = S * r) that starts at state Z, the state that step i reads is
Z + sum_{j<i} h_j B_j, so all of the block's products with the state can be done at once:

    P      = Z A_blk^T                                  [T, m]   one product
    h_i    = act(p_i + sum_{j<i} h_j gram[j, i])                 gram[j, i] = B_j A_i^T, known once the weights are
    Z     += H B_blk                                    [T, d]   one product

K dependent pairs of thin products become K / S pairs of wide ones and K small ones, for (S - 1) r / (4 d) more FLOPs
and bytes. It is the oracle of the kernels' blocked arithmetic, and runs by the backend 'lookahead'.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import silu

from .activations import ACTIVATIONS
from .chain import ChainWeights
from .reference import chain_output, state_dtype

BLOCK = 128  # the width of Gram blocks on a CPU: the fastest there, and 64 to 512 are all within 15%
# Of ranks up to SOLVED, what earlier steps of a block add to later ones is one launch on a GPU, the solve, which has a
# program for 64 tokens. What a wider step adds is a product large enough to fill a device by itself.
SOLVED = 128
SOLVE_WIDTH = 512  # columns of a block that is solved: the most whose steps stay in registers
SOLVE_STEPS = 16  # and its steps, which are unrolled: 120 small products


@torch.no_grad()
def lookahead(x: Tensor, chain: ChainWeights, *, block: int = BLOCK, gram: Tensor | None = None) -> Tensor:
    """The output of a DLR-Net of plain steps, a block of steps at a time; inference only.

    Args:
        x: The tokens, [..., d], of any float dtype.
        chain: The weights; G must be None.
        block: The most columns of a block of steps where `gram` is not given; a step has r of them, and a block at
            least one step.
        gram: What `gram_blocks` gave for these weights; computed in every call if None.

    Returns:
        y, of x's shape and dtype.

    Raises:
        ValueError: The weights do not form a chain of plain steps, or x or `gram` does not fit it.
    """
    chain.check(x)
    if chain.G is not None:
        raise ValueError("look-ahead runs plain steps only: a gated chain runs by `chain_reference`")
    if gram is None:
        gram = gram_blocks(chain.A, chain.B, block=block)
    else:
        check_gram(gram, chain.A)
    return run_blocks(x, chain, gram)


def run_blocks(x: Tensor, chain: ChainWeights, gram: Tensor) -> Tensor:
    """`lookahead` for tokens, a chain and Gram blocks that were checked, where no gradient is recorded."""
    A, B, rank = chain.A, chain.B, chain.A.shape[2]
    width = gram_steps(gram) * rank
    start = x.reshape(-1, x.shape[-1]).to(state_dtype(A.dtype))
    z = start.expand(A.shape[0], -1, -1).clone()
    # One lane goes without its dimension: a batched product of one costs twice the overhead on a CPU.
    lane = (lambda w: w[0]) if len(z) == 1 else (lambda w: w)
    z = lane(z)
    multiply, add = _products(A)
    reads, writes = _blocks(lane(wide(A)), width), _blocks(lane(wide(B)), width)
    for A_blk, B_blk, gram_blk in zip(reads, writes, lane(gram).unbind(-3), strict=True):
        P = multiply(z, A_blk.mT)
        _solve(P, gram_blk, rank, chain.act, add)
        add(z, P, B_blk)
    return chain_output(x, chain, z - start if z.dim() == 2 else (z - start).sum(0))


def gram_blocks(A: Tensor, B: Tensor, *, block: int = BLOCK) -> Tensor:
    """The Gram blocks of plain steps: what the steps of a block add to what later ones of it read.

    They are summed in float32 or better. Tiles that would be zero, of no earlier step, are left out: for blocks of one
    step, where nothing comes before, that is all.

    Args:
        A: What the steps read, [L, K, r, d].
        B: What they write, [L, K, r, d].
        block: The most columns of a block. See `block_steps` for its steps, S.

    Returns:
        The blocks, [L, N, S (S - 1) / 2 r, r] in the weights' dtype, for N = ceil(K / S). Tiles of r rows: of step 1
        that of step 0, then of step 2 those of steps 0 and 1, and so on. The tile of step i and an earlier one j is
        B_j A_i^T. Where the last block has fewer steps its last tiles are 0.
    """
    lanes, depth, rank, _ = A.shape
    steps = block_steps(block, depth, rank)
    gram = A.new_zeros(lanes, -(-depth // steps), steps * (steps - 1) // 2 * rank, rank)
    with without_autocast(A.device.type):
        for k in range(depth):
            n, i = divmod(k, steps)
            if i == 0:
                continue
            # 16-bit weights are multiplied as float32: these products are made once
            before, reads = (W.to(state_dtype(W.dtype)) for W in (B[:, k - i : k], A[:, k]))
            own_tiles(gram, i).select(1, n).copy_(wide(before) @ reads.mT)
    return gram


def own_tiles(gram: Tensor, step: int) -> Tensor:
    """A view of the tiles that step `step` of each block reads, [.., step r, r], of gram [.., S (S - 1) / 2 r, r]."""
    rank = gram.shape[-1]
    return gram.narrow(-2, step * (step - 1) // 2 * rank, step * rank)


def gram_steps(gram: Tensor) -> int:
    """The steps S of a Gram block, of gram [.., S (S - 1) / 2 r, r]."""
    return (1 + isqrt(1 + 8 * (gram.shape[-2] // gram.shape[-1]))) // 2


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast switched off, where it is on: it would round float32 weights, and clash with written-on results."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def block_steps(block: int, depth: int, rank: int) -> int:
    """Steps of a Gram block of at most `block` columns: at least one, at most the chain's, or what a solve takes."""
    if rank <= SOLVED:
        block = min(block, SOLVE_WIDTH, SOLVE_STEPS * rank)
    return max(1, min(depth, block // rank))


def check_gram(gram: Tensor, A: Tensor) -> None:
    """Checks that `gram` has the form of Gram blocks for weights like A [L, K, r, d].

    Raises:
        ValueError: It has not; the message names the shapes and dtypes.
    """
    lanes, depth, rank, _ = A.shape
    fits = gram.dim() == 4 and gram.shape[-1] == rank and gram.dtype == A.dtype
    if fits:
        steps = gram_steps(gram)
        wanted = (lanes, -(-depth // steps), steps * (steps - 1) // 2 * rank, rank)
        fits = gram.shape == wanted and steps == block_steps(steps * rank, depth, rank)
    if not fits:
        raise ValueError(
            f"Gram blocks of shape {tuple(gram.shape)} and {gram.dtype} do not fit weights of {tuple(A.shape)} "
            f"and {A.dtype}"
        )


def wide(W: Tensor) -> Tensor:
    """The rows of a lane's steps under one another: [L, S, r, d] becomes [L, S r, d], a view where L is 1."""
    return W.flatten(1, 2)


def _blocks(W: Tensor, width: int) -> list[Tensor]:
    """The rows of W [.., n, d] in blocks of `width`, the last of which may have fewer."""
    count, left = divmod(W.shape[-2], width)
    whole = W.narrow(-2, 0, count * width).unflatten(
        -2, (count, width)
    )  # views, made in one call: 0.3 us each
    return [*whole.unbind(-3), *([W.narrow(-2, count * width, left)] if left else [])]


def _solve(P: Tensor, gram: Tensor, rank: int, act: str, add: Callable) -> None:
    """Turns P [.., T, m] of a block into its H, in place, with the block's Gram tiles.

    Step i takes what the earlier ones add in one product, of a width that grows. Written on, not anew, and without
    lists: on a CPU at one token an operation costs what its bytes do, and a list what an operation does.
    """
    activation = ACTIVATIONS[act]
    for first in range(0, P.shape[-1], rank):
        p = P.narrow(-1, first, rank)
        if first:
            add(p, P.narrow(-1, 0, first), own_tiles(gram, first // rank))
        if activation is silu:
            silu(p, inplace=True)  # spares a copy: 3 us of 25 a step
        else:
            p.copy_(activation(p))


def _products(
    W: Tensor,
) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], object]]:
    """(a, W) -> a W and (out, a, W) -> out += a W, for matrices like W [L, ..] of a chain, without the lanes of one.

    Operands in W's dtype, summed in float32 where that has 16 bits.
    """
    multiply = torch.mm if len(W) == 1 else torch.bmm
    if W.dtype.itemsize >= 4:
        return multiply, Tensor.addmm_ if len(W) == 1 else Tensor.baddbmm_
    if W.is_cuda:

        def product(a: Tensor, W: Tensor) -> Tensor:
            return multiply(a.to(W.dtype), W, out_dtype=torch.float32)
    else:

        def product(a: Tensor, W: Tensor) -> Tensor:
            # torch's CPU products of 16-bit operands also round their result; exact in float32
            return multiply(a.to(W.dtype).float(), W.float())

    return product, lambda out, a, W: out.add_(product(a, W))
