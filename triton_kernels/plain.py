"""What runs where there are no kernels, on a CPU above all: the definition's steps in as few operations as can be.

On a CPU a step waits for its weights and for the overhead of each operation. 2 K products and little beside them are
the fastest there: rounds of several steps (`lookahead`) have their Gram blocks to read, too.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from .activations import ACTIVATIONS
from .chain import ChainWeights
from .reference import chain_output, state_dtype


def run_plain(x: Tensor, chain: ChainWeights) -> Tensor:
    """`chain_reference` for tokens and a chain of plain steps that were checked, where no gradient is recorded.

    Products with 16-bit weights give 16 bits, as the definition's do: no weight is converted.
    """
    A, B, activation = chain.A, chain.B, ACTIVATIONS[chain.act]
    start = x.reshape(-1, x.shape[-1]).to(state_dtype(A.dtype))
    z = start.expand(A.shape[0], -1, -1).clone()
    if one := len(z) == 1:  # goes without its dimension: a batched product of one costs twice the overhead
        z, reads, writes = z[0], A[0].unbind(0), B[0].unbind(0)
    else:
        reads, writes = A.unbind(1), B.unbind(1)
    product, add_product = (torch.mm, z.addmm_) if one else (torch.bmm, z.baddbmm_)
    # Every step writes to the same memory: new pages each time cost 1 to 2% at 512 tokens.
    h = z.new_empty((*z.shape[:-1], A.shape[2]), dtype=A.dtype)
    narrow = (
        None
        if z.dtype == A.dtype
        else (torch.empty_like(z, dtype=A.dtype), torch.empty_like(z, dtype=A.dtype))
    )
    for A_k, B_k in zip(reads, writes, strict=True):
        product(z if narrow is None else narrow[0].copy_(z), A_k.mT, out=h)
        hidden = silu(h, inplace=True) if activation is silu else activation(h)
        if narrow is None:
            add_product(hidden, B_k)
        else:
            z += product(hidden, B_k, out=narrow[1])
    update = z.sub_(start)
    return chain_output(x, chain, update if one else update.sum(0))
