"""The chain as its definition reads: one step after another, in plain torch, differentiable.

For a token x in R^d (row vectors), lanes l, steps k, rank r:

    z[l,0]   = x
    h[l,k]   = act(z[l,k] A[l,k]^T)          or, gated, act(z[l,k] G[l,k]^T) * (z[l,k] A[l,k]^T)
    z[l,k+1] = z[l,k] + h[l,k] B[l,k]
    y        = scale * sum_l (z[l,K] - x) + bias

This is the oracle of every faster form, and the network that an attacker, or the audit, trains. The state z
is float32 where the weights are 16 bits wide: rounding it to bf16 at every step costs a factor of six in
error (1.4e-2 instead of 2.3e-3 on a trained chain of 36 steps).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .chain import ChainWeights

Visit = Callable[[int, Tensor, list[Tensor]], object]  # of a step, see `lane_updates`


def chain_reference(x: Tensor, chain: ChainWeights) -> Tensor:
    """The output of a DLR-Net, by its definition; differentiable.

    Args:
        x: The tokens, [..., d], of any float dtype.
        chain: The weights; its steps may be gated.

    Returns:
        y, of x's shape and dtype.

    Raises:
        ValueError: The weights do not form a chain, or x does not fit it.
    """
    chain.check(x)
    return run_steps(x, chain)


def lane_updates(x: Tensor, chain: ChainWeights, visit: Visit | None = None) -> Tensor:
    """What each lane adds to its state: z[l,K] - x; differentiable.

    Args:
        x: The tokens, [T, d], of any float dtype.
        chain: The weights, of which scale and bias play no part; its steps may be gated.
        visit: Called in every step with its number, from 0, the state before it, [L, T, d], and what it reads of that:
            z A^T and, of a gated step, z G^T, [L, T, r] each.

    Returns:
        The updates, [L, T, d], in the state's dtype: float32 for weights of 16 bits, else the weights'.

    Raises:
        ValueError: The weights do not form a chain, or x does not fit it.
    """
    chain.check(x)
    return _updates(x, chain, visit)


def flattened_reference(x: Tensor, chain: ChainWeights) -> Tensor:
    """What is left of a DLR-Net when every step reads x instead of its own state: an MLP of width L K r.

    The distance between it and `chain_reference` is the flatten gap. Arguments, result and errors are the same.
    """
    chain.check(x)
    gates = None if chain.G is None else _side_by_side(chain.G)
    tokens = x.reshape(1, -1, x.shape[-1]).to(chain.A.dtype)
    h = _hidden(_reads(tokens, _side_by_side(chain.A), gates), chain.act)
    return chain_output(x, chain, torch.bmm(h, _side_by_side(chain.B))[0])


def run_steps(x: Tensor, chain: ChainWeights) -> Tensor:
    """`chain_reference` for tokens and a chain that were checked."""
    return chain_output(x, chain, _updates(x.reshape(-1, x.shape[-1]), chain).sum(0))


def chain_output(x: Tensor, chain: ChainWeights, update: Tensor) -> Tensor:
    """y, of x's shape [..., d] and dtype, from the sum of the lanes' updates [T, d]: scale * update + bias."""
    state = state_dtype(chain.A.dtype)
    y = chain.scale.to(state) * update.to(state) + chain.bias.to(state)
    return y.to(x.dtype).reshape(x.shape)


def state_dtype(weights: torch.dtype) -> torch.dtype:
    """The dtype of the state z for weights of a dtype: float32 for the 16-bit ones, else the weights' own."""
    return torch.float32 if weights.itemsize < 4 else weights


def add_product(z: Tensor, h: Tensor, B: Tensor, sign: int = 1) -> Tensor:
    """z + sign h B for all lanes, summed in z's dtype: z [L, T, d], h [L, T, r], B [L, r, d]."""
    if z.dtype == h.dtype:
        return torch.baddbmm(z, h, B, alpha=sign)
    return z.add(torch.bmm(h, B), alpha=sign)


def _reads(z: Tensor, A: Tensor, G: Tensor | None) -> list[Tensor]:
    """What one step of all lanes reads, [L, T, r] each, for z [L, T, d], A and G [L, r, d], all of one dtype."""
    return [torch.bmm(z, reader.mT) for reader in (A, G) if reader is not None]


def _hidden(reads: list[Tensor], act: str) -> Tensor:
    p, *gates = reads
    return ACTIVATIONS[act](gates[0]) * p if gates else ACTIVATIONS[act](p)


def _updates(x: Tensor, chain: ChainWeights, visit: Visit | None = None) -> Tensor:
    A, B, _, _, G, act = chain
    start = x.to(state_dtype(A.dtype)).expand(A.shape[0], -1, -1)
    z = start
    # unbind, not indexing: its backward writes each weight's gradient once, not once a step
    gates = [None] * A.shape[1] if G is None else G.unbind(1)
    for k, (A_k, B_k, G_k) in enumerate(zip(A.unbind(1), B.unbind(1), gates, strict=True)):
        reads = _reads(z.to(A.dtype), A_k, G_k)
        if visit is not None:
            visit(k, z, reads)
        z = add_product(z, _hidden(reads, act), B_k)
    return z - start


def _side_by_side(W: Tensor) -> Tensor:
    """All lanes' steps as one: [L, K, r, d] -> [1, L K r, d]."""
    return W.reshape(1, -1, W.shape[-1])
