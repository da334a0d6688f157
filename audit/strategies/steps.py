"""What the forms of a chain that can be trained have in common. The formulas are `chain_reference`'s.

Readers are the matrices that read the state: A or, of gated steps, A and G. What they read is P, or P and Q.
"""

from collections.abc import Iterator, Sequence

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


def parts(chain: ChainWeights, steps: int) -> Iterator[list[Tensor]]:
    """B and the readers [L, S, r, d], for S = `steps` steps at a time or what is left of them.

    Split, not indexed: its backward writes a weight's gradient once, not once a part.
    """
    return map(
        list, zip(*(W.split(steps, 1) for W in (chain.B, chain.A, chain.G) if W is not None), strict=True)
    )


def lane_steps(z: Tensor, act: str, B: Tensor, *readers: Tensor) -> Tensor:
    """The state after the steps B, readers [L, S, r, d] from the state z [L, T, d] of every lane."""
    for B_k, *readers_k in zip(*(W.unbind(1) for W in (B, *readers)), strict=True):
        z = add_product(z, hidden(read(z, readers_k), act), B_k)
    return z


def read(z: Tensor, readers: Sequence[Tensor]) -> list[Tensor]:
    """z W^T of the state [L, T, d] for each reader W [L, n, d]: [L, T, n] in the readers' dtype."""
    seen = z.to(readers[0].dtype)
    return [torch.bmm(seen, W.mT) for W in readers]


def hidden(reads: Sequence[Tensor], act: str) -> Tensor:
    """h = act(p) or, gated, act(q) * p."""
    p, *gate = reads
    return ACTIVATIONS[act](gate[0]) * p if gate else ACTIVATIONS[act](p)


def hidden_backward(reads: Sequence[Tensor], act: str, dh: Tensor) -> tuple[Tensor, ...]:
    """Gradients of what was read from that of h, by autograd on these tensors alone."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in reads]
        h = hidden(leaves, act)
    return torch.autograd.grad(h, leaves, dh)
