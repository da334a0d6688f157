"""How well a chain does what its MLP did, and how far it is from what flattening makes of it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime import DLRNet
from ..triton_kernels import chain_reference, flattened_reference, lane_updates

LOCKED_GAP = 0.5  # a chain whose flatten gap is below is not locked: flattening undoes it
_ROWS = 4096  # tokens at a time


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How one locked module does on held-out tokens.

    rel_error: mean over tokens of |chain - mlp|^2 / |mlp|^2. flatten_gap: the same distance between the chain
    and its flattened self, over |mlp|^2. coupling: RMS of the lanes' updates over RMS of x. first_error: the
    relative error of sequences' first tokens alone, None where there are none; these carry the massive
    activations of some models.
    """

    rel_error: float
    flatten_gap: float
    coupling: float
    first_error: float | None = None

    @property
    def locked(self) -> bool:
        """Whether the flatten gap is large enough to call this a lock."""
        return self.flatten_gap >= LOCKED_GAP

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "locked": self.locked}


@torch.no_grad()
def measure(net: DLRNet, x: Tensor, y: Tensor, device: torch.device, first: Tensor | None = None) -> Fidelity:
    """Compares a chain, with its weights as stored but in float32, with y = mlp(x) on held-out x, y [N, d].

    first: bool [N], which tokens are the first of their sequences.
    """
    weights = A, B, _, _, G, act = in_float32(net, device)
    errors, gap, update, size = [], 0.0, 0.0, 0.0
    for start in range(0, len(x), _ROWS):
        xb, yb = (t[start : start + _ROWS].to(device, torch.float32) for t in (x, y))
        chain = chain_reference(xb, *weights)
        flat = flattened_reference(xb, *weights)
        errors.append(relative_error(chain, yb).cpu())
        gap += ((flat - chain).square().sum(1) / size_of(yb)).sum().item()
        update += lane_updates(xb, A, B, G, act).square().mean(0).sum().item()
        size += xb.square().sum().item()
    error = torch.cat(errors)
    return Fidelity(
        error.mean().item(),
        gap / len(x),
        math.sqrt(update / size) if size else 0.0,
        error[first].mean().item() if first is not None and first.any() else None,
    )


def in_float32(
    net: DLRNet, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, str]:
    """(A, B, scale, bias, G, act): what `chain_reference` takes besides x, in float32 on `device`."""
    A, B, scale, bias = (
        w.to(device, torch.float32) for w in (net.dlr_A, net.dlr_B, net.dlr_scale, net.dlr_bias)
    )
    return A, B, scale, bias, None if net.dlr_G is None else net.dlr_G.to(device, torch.float32), net.spec.act


def relative_error(y: Tensor, wanted: Tensor) -> Tensor:
    """|y - wanted|^2 / |wanted|^2 for every token: [T, d], [T, d] -> [T]."""
    return (y - wanted).square().sum(1) / size_of(wanted)


def size_of(wanted: Tensor) -> Tensor:
    """|wanted|^2 of every token, [T, d] -> [T]; a token without output counts as one of a millionth of the mean."""
    size = wanted.square().sum(1)
    return size.clamp(min=1e-6 * size.mean().clamp(min=1e-30))
