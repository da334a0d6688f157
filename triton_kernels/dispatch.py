"""From a call of the op on a GPU to launches: which path, with which memory."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .cost import MAX_DECODE_TOKENS, Device, Shape, choose, device_constants
from .decode import Workspace, decode, workspace
from .decode_plan import DecodePlan
from .device import KERNEL_ACTS
from .prefill import prefill
from .tuning import tune, tuned, wanted

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(A: Tensor, act: str) -> str | None:
    """Why the kernels cannot run a chain of such weights and activation, as the end of a sentence; else None."""
    if act not in KERNEL_ACTS:
        return f"has no activation {act!r}; it has {', '.join(sorted(KERNEL_ACTS))}"
    if A.dtype not in _DTYPES:
        return f"has no weights of {A.dtype}"
    return None


def run(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    bias: Tensor,
    G: Tensor | None,
    act: str,
    gram: Tensor,
) -> Tensor:
    """y [T, d] in x's dtype, for x [T, d] on a GPU and a chain with its Gram blocks."""
    x = x.contiguous()
    if len(x) == 0:
        return torch.empty_like(x)
    A, B, G = A.contiguous(), B.contiguous(), G if G is None else G.contiguous()
    lanes, depth, rank, hidden = A.shape
    shape = Shape(lanes, depth, rank, hidden, len(x), G is not None, A.dtype.itemsize)
    deterministic = torch.are_deterministic_algorithms_enabled()
    device, steps = device_constants(x.device.index), gram.shape[-1] // rank

    def launch(plan: DecodePlan | None) -> Tensor:
        if plan is None:
            return prefill(x, A, B, scale, bias, G, act, gram)
        gate_gram = None if G is None else gram[1]
        space = _workspace(plan, x.device)
        return decode(x, A, B, scale, bias, gram[0], G, gate_gram, act, plan=plan, workspace=space)

    return launch(_plan(shape, device, steps, deterministic, launch))


def _plan(
    shape: Shape,
    device: Device,
    steps: int,
    deterministic: bool,
    launch: Callable[[DecodePlan | None], Tensor],
) -> DecodePlan | None:
    """What was measured, if it was; else what the cost model says. Prefill, None, is all there is for many tokens."""
    if shape.tokens > MAX_DECODE_TOKENS:
        return None
    if found := tuned(shape, device, steps, deterministic):
        return found[0]
    if wanted() and not torch.cuda.is_current_stream_capturing():
        return tune(shape, device, steps, deterministic, launch)
    return choose(shape, device, steps, deterministic)


def _workspace(plan: DecodePlan, device: torch.device) -> Workspace:
    """Memory that no other launch uses at the same time: one for each stream, and one for captured graphs.

    Graphs of one plan share theirs, so replay them on one stream. A capture without a call before it gets memory
    of its own in the graph's pool, which the graph then also zeroes.
    """
    if not torch.cuda.is_current_stream_capturing():
        _kept(plan, device, None)  # for the capture to come: it must not allocate
        return _kept(plan, device, torch.cuda.current_stream(device).cuda_stream)
    kept = _captured.get((plan, device))
    return workspace(plan, device) if kept is None else kept


_captured: dict[tuple[DecodePlan, torch.device], Workspace] = {}


@cache
def _kept(plan: DecodePlan, device: torch.device, stream: int | None) -> Workspace:
    space = workspace(plan, device)
    if stream is None:
        # Zeroed on the current stream; a graph may be replayed on another one before that is over.
        torch.cuda.current_stream(device).synchronize()
        _captured[plan, device] = space
    return space
