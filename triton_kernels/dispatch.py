"""From a call of the op on a GPU to launches: which path, and its arguments as the launches want them."""

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .chain import ChainWeights
from .cost import choose
from .decode import decode
from .decode_plan import DecodePlan
from .gpu import Device, device_constants
from .lookahead import gram_steps
from .prefill import prefill
from .rounds import Shape

_too_large: set[tuple[DecodePlan, Device]] = set()


def run(x: Tensor, chain: ChainWeights, gram: Tensor) -> Tensor:
    """y [T, d] in x's dtype, for x [T, d] on a GPU and a chain of plain steps with its Gram blocks, all checked."""
    x = _plain(x)
    if len(x) == 0:
        return torch.empty_like(x)
    vectors = _plain(chain.scale.float()), _plain(chain.bias.float())
    chain = ChainWeights(_plain(chain.A), _plain(chain.B), *vectors, act=chain.act)
    shape, device = Shape.of(chain.A, len(x)), device_constants(x.device.index)
    plan = choose(shape, device, gram_steps(gram), torch.are_deterministic_algorithms_enabled())
    if plan is not None and (plan, device) not in _too_large:
        try:
            return decode(x, chain, plan)
        except OutOfResources:  # shared memory that this device does not have: prefill needs less
            _too_large.add((plan, device))
    return prefill(x, chain, _plain(gram), device)


def _plain(t: Tensor) -> Tensor:
    """The tensor, or a copy, contiguous and from a multiple of 16 bytes on, as launches want it."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()
