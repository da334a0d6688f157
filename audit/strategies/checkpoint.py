"""Checkpointing: keep less between forward and backward, compute more.

Chen et al., arXiv 1604.06174. All by torch.utils.checkpoint without re-entry, which composes with everything else.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ...triton_kernels import ChainWeights
from .steps import lane_steps, lanes_of, output, parts

_PRODUCTS = {getattr(torch.ops.aten, name).default: i for name, i in (("mm", 0), ("bmm", 0), ("addmm", 1))}


def checkpointed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, of which only the arguments are kept: the backward pass runs it once more."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def selective(function: Callable[..., Tensor], hidden_size: int) -> Callable[..., Tensor]:
    """The same function, of which the products that read the hidden state are kept, all else computed once more.

    These are the products over `hidden_size` features: P = z A^T of a step, gate and up of an MLP. What they give is
    narrow against a chain's states, and what follows from them is elementwise or, for the states, half of the forward
    products. Kept by the selective checkpoint's own cache, outside autograd's hooks.
    """

    def keep(_: Any, operation: Any, *args: Any, **__: Any) -> CheckpointPolicy:
        first = _PRODUCTS.get(operation)
        reads_state = first is not None and args[first].shape[-1] == hidden_size
        return CheckpointPolicy.MUST_SAVE if reads_state else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, keep)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs
        )

    return run


def segmented(x: Tensor, chain: ChainWeights, *, steps: int) -> Tensor:
    """The chain, of plain steps, of which every `steps`-th state is kept; for the rest as `chain_reference`.

    Keeps K / steps states a lane, and computes once more, with all it needs, one segment at a time: (K / steps +
    steps) d a token and lane at the peak, for 4/3 of the FLOPs. In `checkpointed`, it is the nested checkpoint: d a
    token is kept, for 5/3 of the FLOPs.
    """
    start = z = lanes_of(x, chain)
    run = checkpointed(lane_steps)
    for A, B in parts(chain, steps):
        z = run(z, chain.act, A, B)
    return output(x, chain, start, z)
