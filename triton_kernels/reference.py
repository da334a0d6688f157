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

import torch
from torch import Tensor

from .activations import ACTIVATIONS


def chain_reference(
    x: Tensor, A: Tensor, B: Tensor, scale: Tensor, bias: Tensor, G: Tensor | None = None, act: str = "silu"
) -> Tensor:
    """Output of a DLR-Net, by its definition.

    x: [..., d], any float dtype. A, B and, for gated steps, G: [L, K, r, d] of one float dtype.
    scale, bias: [d]. Returns y: [..., d] in x's dtype.
    Raises ValueError on shapes or an activation that do not fit.
    """
    tokens = x.reshape(-1, x.shape[-1])
    state = state_dtype(A.dtype)
    y = scale.to(state) * lane_updates(tokens, A, B, G, act).sum(0) + bias.to(state)
    return y.to(x.dtype).reshape(x.shape)


def lane_updates(x: Tensor, A: Tensor, B: Tensor, G: Tensor | None = None, act: str = "silu") -> Tensor:
    """z[l,K] - x of every lane: [L, T, d] in the state's dtype, for x [T, d]. Same errors as `chain_reference`."""
    check_chain(x, A, B, G, act)
    start = x.to(state_dtype(A.dtype)).expand(A.shape[0], -1, -1)
    z = start
    # unbind, not indexing: its backward writes each weight's gradient once, not once a step
    gates = [None] * A.shape[1] if G is None else G.unbind(1)
    for A_k, B_k, G_k in zip(A.unbind(1), B.unbind(1), gates, strict=True):
        z = add_product(z, step_hidden(z.to(A.dtype), A_k, G_k, act), B_k)
    return z - start


def flattened_reference(
    x: Tensor, A: Tensor, B: Tensor, scale: Tensor, bias: Tensor, G: Tensor | None = None, act: str = "silu"
) -> Tensor:
    """What is left of the chain when every step reads x instead of its own state: an MLP of width L*K*r.

    Arguments, result and errors as `chain_reference`. The distance between the two is the flatten gap.
    """
    tokens = x.reshape(-1, x.shape[-1])
    check_chain(tokens, A, B, G, act)
    state = state_dtype(A.dtype)
    h = step_hidden(tokens.to(A.dtype)[None], _wide(A), None if G is None else _wide(G), act)
    y = scale.to(state) * torch.bmm(h, _wide(B))[0].to(state) + bias.to(state)
    return y.to(x.dtype).reshape(x.shape)


def state_dtype(weights: torch.dtype) -> torch.dtype:
    """The dtype of the state z for weights of a dtype: float32 for the 16-bit ones, else the weights' own."""
    return torch.float32 if weights.itemsize < 4 else weights


def check_chain(x: Tensor, A: Tensor, B: Tensor, G: Tensor | None, act: str) -> None:
    """Raises ValueError, naming the shapes, unless x [T, d] and A, B, G [L, K, r, d] form a chain."""
    if act not in ACTIVATIONS:
        raise ValueError(f"unknown activation {act!r}; one of {', '.join(sorted(ACTIVATIONS))}")
    shapes = [tuple(w.shape) for w in (A, B, G) if w is not None]
    if A.dim() != 4 or len(set(shapes)) != 1:
        raise ValueError(f"A, B and G must share one shape [L, K, r, d], not {shapes}")
    dtypes = {W.dtype for W in (A, B, G) if W is not None}
    if not x.dtype.is_floating_point or len(dtypes) > 1 or not A.dtype.is_floating_point:
        raise ValueError(
            f"a chain wants float tokens and weights of one float dtype, not {x.dtype} and {dtypes}"
        )
    if 0 in A.shape:
        raise ValueError(f"a chain of shape {list(A.shape)} has no weights")
    if x.dim() == 0:
        raise ValueError(f"one number does not fit a chain of {A.shape[-1]} features")
    if x.shape[-1] != A.shape[-1]:
        raise ValueError(f"tokens of {x.shape[-1]} features do not fit a chain of {A.shape[-1]}")


def _wide(W: Tensor) -> Tensor:
    """All lanes' steps side by side: [L, K, r, d] -> [1, L*K*r, d]."""
    return W.reshape(1, -1, W.shape[-1])


def step_hidden(z: Tensor, A: Tensor, G: Tensor | None, act: str) -> Tensor:
    """h of one step of all lanes: z [L, T, d], A and G [L, r, d] -> [L, T, r]."""
    p = torch.bmm(z, A.mT)
    if G is None:
        return ACTIVATIONS[act](p)
    return ACTIVATIONS[act](torch.bmm(z, G.mT)) * p


def add_product(z: Tensor, h: Tensor, B: Tensor, sign: int = 1) -> Tensor:
    """z + sign h B for all lanes, summed in z's dtype: z [L, T, d], h [L, T, r], B [L, r, d]."""
    if z.dtype == h.dtype:
        return torch.baddbmm(z, h, B, alpha=sign)
    return z.add(torch.bmm(h, B), alpha=sign)
