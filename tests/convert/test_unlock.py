"""The attack on one module: it must undo what can be undone."""

import pytest
import torch

from dlr_lock.convert.capture import Activations
from dlr_lock.convert.unlock import flattened, undo
from dlr_lock.runtime import DLRNet, DLRSpec

CPU = torch.device("cpu")
D, N = 32, 2048


def chain(coupling: float, *, act: str = "silu", lanes: int = 1, gated: bool = False) -> DLRNet:
    spec = DLRSpec(D, lanes, 4, 16, act, gated)
    net = DLRNet(spec)
    weights = {name: torch.randn(spec.weight_shape) / D**0.5 for name in net.weight_names(spec)}
    weights["dlr_B"] *= coupling
    net.assign(weights | {"dlr_scale": torch.full((D,), 1 / coupling), "dlr_bias": torch.zeros(D)})
    return net


def pairs(net: DLRNet) -> Activations:
    x = torch.randn(N + 512, D)
    with torch.no_grad():
        y = net(x)
    return Activations(x, y, torch.arange(len(x)) % 64 == 0, mapped=False)


def attack(net: DLRNet, start: str, visits: int):
    return undo(net, pairs(net), N, 0.0, visits=visits, conversion=4096, name="mlp", device=CPU, start=start)


def copy_of(net: DLRNet, data: Activations, linear: bool) -> DLRNet:
    spec, tensors = flattened(net, data, N, CPU, linear=linear)
    copy = DLRNet(spec)
    copy.assign(tensors)
    return copy


@pytest.mark.parametrize(("lanes", "gated"), [(1, False), (3, False), (1, True)])
def test_a_weakly_coupled_chain_is_given_away_by_flattening(lanes: int, gated: bool) -> None:
    net = chain(1e-3, lanes=lanes, gated=gated)
    data = pairs(net)
    with torch.no_grad():
        error = (copy_of(net, data, linear=False)(data.x) - data.y).norm() / data.y.norm()
    assert error < 0.02
    assert attack(net, "flat", 512).copy_error < 0.05


@pytest.mark.parametrize("lanes", [1, 2])
def test_the_linear_start_sees_through_a_state_that_is_linear_in_x(lanes: int) -> None:
    """With a linear activation z_k is exactly x J_k: strong coupling hides nothing then."""
    net = chain(0.5, act="linear", lanes=lanes)
    data = pairs(net)
    with torch.no_grad():
        seen, blind = (
            ((copy_of(net, data, linear=linear)(data.x) - data.y).norm() / data.y.norm()).item()
            for linear in (True, False)
        )
    assert seen < 1e-2 < 0.1 < blind


def test_a_strongly_coupled_chain_takes_work_and_more_work_undoes_more() -> None:
    torch.manual_seed(0)
    net = chain(0.5)
    little, more = (attack(net, "linear", visits) for visits in (512, 40_960))
    assert more.copy_error < 0.7 * little.copy_error
    assert more.cost == 10 and more.chain_error == 0.0 and not more.undone
