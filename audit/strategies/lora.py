"""LoRA (arXiv 2106.09685): the weights stay, and low-rank changes of them are trained.

A weight W [.., n, d] gets V [.., n, a] and U [.., a, d], of adapter rank a: W + V U. Written apart, as
z W^T + (z U^T) V^T, the frozen product keeps no input and has no gradient of W: 2/3 of plain training's FLOPs, and as
many states kept, for U wants them. Merged, W + V U is formed once a step and trained like any weight, by any form of
the chain.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...common.hooks import removed
from ...microbench.slot import DenseWeights
from ...triton_kernels import ACTIVATIONS, ChainWeights
from .steps import lanes_of, output

Adapter = tuple[Tensor, Tensor]  # V, U


def new_adapter(W: Tensor, rank: int) -> Adapter:
    """V of zeros and a random U for W [.., n, d], both to be trained: the model starts unchanged."""
    *lead, n, d = W.shape
    V = W.new_zeros(*lead, n, rank).requires_grad_()
    return V, (torch.randn(*lead, rank, d, dtype=W.dtype, device=W.device) * d**-0.5).requires_grad_()


def adapted_chain(x: Tensor, chain: ChainWeights, *, adapters: Sequence[Adapter]) -> Tensor:
    """The chain with adapters written apart; result and errors as those of `chain_reference`.

    Args:
        x: The tokens, [..., d].
        chain: The weights; its steps may be gated.
        adapters: V [L, K, r, a] and U [L, K, a, d] for A, B and, of gated steps, G, in this order.
    """
    act = chain.act
    start = z = lanes_of(x, chain)
    flat = [t for W, (V, U) in zip(chain.weights, adapters, strict=True) for t in (W, V, U)]
    for step in zip(*(t.unbind(1) for t in flat), strict=True):
        (A_k, *A_k_low), (B_k, V, U), *gate = (step[i : i + 3] for i in range(0, len(step), 3))
        seen = z.to(chain.A.dtype)
        h = _reads(seen, A_k, *A_k_low)
        h = ACTIVATIONS[act](_reads(seen, *gate[0])) * h if gate else ACTIVATIONS[act](h)
        z = z + (torch.bmm(h, B_k) + torch.bmm(torch.bmm(h, V), U))
    return output(x, chain, start, z)


def merged_chain(
    x: Tensor, chain: ChainWeights, *, adapters: Sequence[Adapter], form: Callable[..., Tensor]
) -> Tensor:
    """`adapted_chain` with W + V U in the place of each W, by any form of the chain."""
    merged = [W + V @ U for W, (V, U) in zip(chain.weights, adapters, strict=True)]
    A, B, *G = merged
    return form(x, chain._replace(A=A, B=B, G=G[0] if G else None))


def adapted_mlp(x: Tensor, weights: DenseWeights, *, adapters: Sequence[Adapter]) -> Tensor:
    """`dense_mlp` with an adapter for each of gate, up and down, written apart."""
    gate, up, down = weights
    of_gate, of_up, of_down = adapters
    linear = nn.functional.linear
    h = nn.functional.silu(linear(x, gate) + low_rank(x, *of_gate)) * (linear(x, up) + low_rank(x, *of_up))
    return linear(h, down) + low_rank(h, *of_down)


@contextmanager
def attached(linears: Sequence[nn.Module], rank: int) -> Iterator[list[Tensor]]:
    """Linear layers, nn.Linear or Conv1D, with an adapter each, within the block; gives what is to be trained."""
    adapters = [new_adapter(_matrix(linear), rank) for linear in linears]
    hooks = [
        linear.register_forward_hook(lambda _, inputs, y, V=V, U=U: y + low_rank(inputs[0], V, U))
        for linear, (V, U) in zip(linears, adapters, strict=True)
    ]
    with removed(hooks):
        yield [t for adapter in adapters for t in adapter]


def _matrix(linear: nn.Module) -> Tensor:
    """W [n, d]."""
    weight = linear.get_parameter("weight").detach()
    return weight.mT if isinstance(linear, Conv1D) else weight


def low_rank(x: Tensor, V: Tensor, U: Tensor) -> Tensor:
    """x (V U)^T: x [.., d], V [n, a], U [a, d]."""
    return nn.functional.linear(nn.functional.linear(x, U), V)


def _reads(z: Tensor, W: Tensor, V: Tensor, U: Tensor) -> Tensor:
    return torch.bmm(z, W.mT) + torch.bmm(torch.bmm(z, U.mT), V.mT)
