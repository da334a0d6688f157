"""Fresh random chains, and how far an output is from theirs in float64."""

import torch
from torch import Tensor

from dlr_lock.triton_kernels import ChainWeights, chain_reference


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
