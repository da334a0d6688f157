"""Counted bytes, not timings: what autograd keeps of a DLR-Net, against the count made by hand."""

import pytest
import torch
from torch import nn

from dlr_lock.audit import saved_bytes
from dlr_lock.runtime import DLRNet, DLRSpec

TOKENS, FEATURES, WIDTH = 40, 576, 1536  # SmolLM2-135M's MLP: K * r = 1.5 * 1536 for every depth below


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(FEATURES, WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(WIDTH, FEATURES, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def slot_bytes(module: nn.Module) -> int:
    """Saved by a module inside a network: its input arrives with a gradient of its own."""
    module.requires_grad_(True)
    x = torch.randn(TOKENS, FEATURES, requires_grad=True)
    return saved_bytes(module, lambda: module(x).square().sum())


def filled(depth: int) -> DLRNet:
    spec = DLRSpec.matching(FEATURES, WIDTH, mlp_gated=True, depth=depth)
    assert spec.depth == depth and spec.depth * spec.rank == 2304
    net = DLRNet(spec)
    net.assign({name: torch.randn_like(p) / 20 for name, p in net.named_parameters()})
    return net


def test_saved_activations_grow_linearly_with_depth() -> None:
    at = {depth: slot_bytes(filled(depth)) for depth in (12, 24, 48)}
    a_step = (at[24] - at[12]) / 12
    assert (at[48] - at[24]) / 24 == a_step
    assert a_step == 4 * TOKENS * FEATURES  # the state z, in float32


def test_the_count_is_the_formula_of_the_notes() -> None:
    """Saved elements a token: L*K*d + 3f for the chain, d + 4f for the gated MLP."""
    chain = 4 * TOKENS * (24 * FEATURES + 3 * WIDTH)
    mlp = 4 * TOKENS * (FEATURES + 4 * WIDTH)
    output = 3 * 4 * TOKENS * FEATURES  # what scale, bias and the square of the test itself keep, at most
    assert chain <= slot_bytes(filled(24)) <= chain + output
    assert mlp <= slot_bytes(SwiGLU()) <= mlp + output


@pytest.mark.parametrize("shared", [False, True])
def test_a_storage_counts_once_and_parameters_never(shared: bool) -> None:
    layer = nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    y = x if shared else x * 1.0
    # The product saves x and the weight; the elementwise product saves both of its factors.
    got = saved_bytes(layer, lambda: (layer(x) * y).sum())
    assert got == 4 * (4 * 8) * (2 if shared else 3)
