"""What the forms of a chain that can be trained have in common. The formulas are `chain_reference`'s."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...triton_kernels import ACTIVATIONS, ChainWeights
from ...triton_kernels.reference import add_product, chain_output, state_dtype


def lanes_of(x: Tensor, chain: ChainWeights) -> Tensor:
    """The state that every lane starts at: [L, T, d] in the state's dtype, for x [..., d].

    Raises:
        ValueError: On shapes or an activation that do not fit.
    """
    chain.check(x)
    return x.reshape(-1, x.shape[-1]).to(state_dtype(chain.A.dtype)).expand(len(chain.A), -1, -1)


def output(x: Tensor, chain: ChainWeights, start: Tensor, z: Tensor) -> Tensor:
    """y [..., d] in x's dtype: scale times the sum of all lanes' updates z - start [L, T, d], plus bias."""
    return chain_output(x, chain, (z - start).sum(0))


def parts(chain: ChainWeights, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A and B [L, S, r, d], for S = `steps` steps at a time or what is left of them.

    Split, not indexed: its backward writes a weight's gradient once, not once a part.

    Raises:
        ValueError: On gated steps.
    """
    refuse_gated(chain)
    return zip(chain.A.split(steps, 1), chain.B.split(steps, 1), strict=True)


def refuse_gated(chain: ChainWeights) -> None:
    """Raises ValueError on gated steps: they are no lock, and `chain_reference` is the one form that trains them."""
    if chain.G is not None:
        raise ValueError("gated steps are trained step by step, by chain_reference alone")


def lane_steps(z: Tensor, act: str, A: Tensor, B: Tensor) -> Tensor:
    """The state after the steps A, B [L, S, r, d] from the state z [L, T, d] of every lane."""
    for A_k, B_k in zip(A.unbind(1), B.unbind(1), strict=True):
        z = add_product(z, ACTIVATIONS[act](read(z, A_k)), B_k)
    return z


def read(z: Tensor, A: Tensor) -> Tensor:
    """P = z A^T of the state [L, T, d], for A [L, n, d]: [L, T, n] in A's dtype."""
    return torch.bmm(z.to(A.dtype), A.mT)


def activation_backward(p: Tensor, act: str, dh: Tensor) -> Tensor:
    """The gradient of p from that of h = act(p), by autograd on this tensor alone."""
    with torch.enable_grad():
        leaf = p.detach().requires_grad_()
        h = ACTIVATIONS[act](leaf)
    return torch.autograd.grad(h, leaf, dh)[0]
