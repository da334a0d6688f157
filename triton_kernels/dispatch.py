"""From a call of the op on a GPU to launches: which path, with which memory."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .chain import ChainWeights
from .cost import MAX_DECODE_TOKENS, choose
from .decode import Workspace, decode, workspace
from .decode_plan import DecodePlan
from .gpu import Device, device_constants
from .prefill import prefill
from .rounds import Shape
from .tuning import tune, tuned, wanted


def run(x: Tensor, chain: ChainWeights, gram: Tensor) -> Tensor:
    """y [T, d] in x's dtype, for x [T, d] on a GPU and a chain of plain steps with its Gram blocks, all checked."""
    x = _plain(x)
    if len(x) == 0:
        return torch.empty_like(x)
    vectors = _plain(chain.scale.float()), _plain(chain.bias.float())
    chain = ChainWeights(_plain(chain.A), _plain(chain.B), *vectors, act=chain.act)
    gram = _plain(gram)
    shape = Shape.of(chain.A, len(x))
    deterministic = torch.are_deterministic_algorithms_enabled()
    device, steps = device_constants(x.device.index), gram.shape[-2] // shape.rank

    def launch(plan: DecodePlan | None) -> Tensor:
        if plan is None:
            return prefill(x, chain, gram, device)
        return decode(x, chain, gram, plan=plan, workspace=_workspace(plan, x.device))

    def launch_or_prefill(plan: DecodePlan | None) -> Tensor:
        try:
            return launch(None if (plan, device) in _too_large else plan)
        except OutOfResources:  # shared memory that this device does not have: prefill needs less
            _too_large.add((plan, device))
            return launch(None)

    return launch_or_prefill(_plan(shape, device, steps, deterministic, launch))


_plans: dict[tuple[Shape, Device, int, bool], DecodePlan | None] = {}


def _plain(t: Tensor) -> Tensor:
    """The tensor, or a copy, contiguous and from a multiple of 16 bytes on, as launches want it."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


_too_large: set[tuple[DecodePlan | None, Device]] = set()


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
    key = shape, device, steps, deterministic
    if key in _plans:  # what was measured is looked up by a text, for 30 us
        return _plans[key]
    if found := tuned(*key):
        plan = found[0]
    elif wanted():
        if torch.cuda.is_current_stream_capturing():
            return choose(*key)
        plan = tune(*key, launch)
    else:
        plan = choose(*key)
    _plans[key] = plan
    return plan


def _workspace(plan: DecodePlan, device: torch.device) -> Workspace:
    """Memory that no other launch uses at the same time: that of the default stream is kept.

    On other streams every launch gets its own, which it also zeroes. Graphs are captured there, whose branches and
    replays may run at the same time; and `torch.compile(mode="reduce-overhead")` warms up there, with memory that it
    wants back.
    """
    if torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        return workspace(plan, device)
    return _of_default_stream(plan, device)


@lru_cache(maxsize=64)
def _of_default_stream(plan: DecodePlan, device: torch.device) -> Workspace:
    return workspace(plan, device)
