"""Fresh random chains, and how far an output is from theirs in float64."""

import torch
from torch import Tensor

from dlr_lock.triton_kernels import ACTIVATIONS, ChainWeights, chain_reference, lookahead


def drawn(
    lanes: int, depth: int, rank: int, hidden: int, dtype: torch.dtype = torch.float32, act: str = "silu"
) -> ChainWeights:
    """A chain whose updates are about half as large as x; scale and bias in float32."""
    shape = (lanes, depth, rank, hidden)
    A, B = torch.randn(shape) / hidden**0.5, torch.randn(shape) / (depth * rank) ** 0.5
    return ChainWeights(A.to(dtype), B.to(dtype), torch.rand(hidden), torch.randn(hidden), act=act)


def error(y: Tensor, x: Tensor, chain: ChainWeights) -> float:
    """RMS of the difference over RMS of the float64 chain."""
    wanted = chain_reference(x.double(), chain.to(torch.float64))
    return ((y.double() - wanted).square().mean() / wanted.square().mean()).sqrt().item()


def limit(x: Tensor, chain: ChainWeights) -> float:
    """The most that a form may be wrong which rounds operands to the weights' 16 bits and sums in float32.

    1.3 times what plain torch is so, step by step: kernels are within 5% of that, and one that rounds the state or P
    is beyond it, as `rounded_state` shows. A number for all chains would not do: 12 steps lose 9e-4 to 4e-3.
    """
    return 1.3 * error(lookahead(x, chain, block=1), x, chain)


def rounded_state(x: Tensor, chain: ChainWeights) -> Tensor:
    """The chain of one lane as a wrong kernel would have it: its state in the weights' 16 bits after every step."""
    dtype = chain.A.dtype
    z = start = x.to(dtype).float()
    for A, B in zip(chain.A[0].float(), chain.B[0].float(), strict=True):
        h = ACTIVATIONS[chain.act](z @ A.mT).to(dtype).float()
        z = (z + h @ B).to(dtype).float()
    return chain.scale * (z - start) + chain.bias
