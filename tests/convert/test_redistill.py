"""The attack on one module: it must undo what can be undone."""

import pytest
import torch

from dlr_lock.common.errors import DLRError
from dlr_lock.convert.activations.pairs import Activations
from dlr_lock.convert.evaluate import measure
from dlr_lock.convert.redistill import (
    fit_student,
    flattened,
    linear_reads,
    merged,
    redistill,
    regression_flops,
)
from dlr_lock.runtime import DLRNet, DLRSpec
from dlr_lock.triton_kernels.meter import count

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


def attack(net: DLRNet, start: str, train_tokens: int):
    return redistill(
        net,
        pairs(net),
        N,
        train_tokens=train_tokens,
        conversion=4096,
        name="mlp",
        device=CPU,
        inits=[start],
    )


def fit(net: DLRNet, data: Activations, start: str, train_tokens: int, seed: int = 0) -> DLRNet:
    return fit_student(net, data, N, train_tokens=train_tokens, init=start, seed=seed, name="mlp", device=CPU)


@pytest.mark.parametrize(("lanes", "gated"), [(1, False), (3, False), (1, True)])
def test_a_weakly_coupled_chain_is_given_away_by_flattening(lanes: int, gated: bool) -> None:
    net = chain(1e-3, lanes=lanes, gated=gated)
    data = pairs(net)
    with torch.no_grad():
        error = (flattened(net)(data.x) - data.y).norm() / data.y.norm()
    assert error < 0.02
    assert attack(net, "flat", 512).student_error < 0.05


def test_a_chain_that_merges_into_two_wide_steps_is_undone_before_any_training() -> None:
    """With a linear activation regression alone gives two wide steps that are the chain: no student has to do better.
    The chain's target is another function, so that chain and student have errors to compare."""
    torch.manual_seed(0)
    target = torch.randn(N + 512, D)
    found = {}
    for act in ("linear", "relu"):
        net = chain(0.5, act=act)
        data = pairs(net)
        data.y.mul_(1 - 0.3).add_(0.3 * target * data.y.std())
        found[act] = redistill(net, data, N, train_tokens=16, conversion=4096, name="mlp", device=CPU)
    undone, held = found["linear"], found["relu"]
    assert undone.undone and undone.merged_error == pytest.approx(undone.chain_error, rel=0.01)
    assert str(undone) == "undone, 1.00 untrained"
    assert not held.undone and held.merged_error > 1.05 * held.chain_error
    for attack in found.values():
        assert list(attack.errors) == ["linear", "flat", "random"]
        assert attack.errors[attack.init] == attack.error == min(attack.errors.values())
    assert held.to_dict()["undoing_over_conversion"] == {"least": 16 / 4096, "most": None}
    assert undone.to_dict()["undoing_over_conversion"] == {"least": 0, "most": 0}


@pytest.mark.parametrize("lanes", [1, 2])
def test_the_linear_start_sees_through_a_state_that_is_linear_in_x(lanes: int) -> None:
    """With a linear activation z_k is exactly x J_k: strong coupling hides nothing then."""
    net = chain(0.5, act="linear", lanes=lanes)
    data = pairs(net)
    with torch.no_grad():
        seen, blind = (
            ((merged(net, net.spec.depth, reads)(data.x) - data.y).norm() / data.y.norm()).item()
            for reads in (linear_reads(net, data.x), None)
        )
    assert seen < 1e-2 < 0.1 < blind


def test_the_linear_start_is_not_thrown_off_by_tokens_that_move_far() -> None:
    """One token in a hundred moves the state far and out of line: that must not hide how the others move it."""
    net = chain(0.5)
    x = torch.randn(N, D)
    x[:, 0] = torch.where(torch.arange(N) % 100 == 0, 1.0, -1.0)
    with torch.no_grad():
        net.dlr_A *= 1e-2  # silu(p) is nearly p / 2 there
        net.dlr_B *= 1e2
        net.dlr_A[0, 0, 0] = 30 * torch.eye(D)[0]  # a unit that only the rare tokens wake
        net.dlr_B[0, 0, 0] = 30 * torch.randn(D)
        usual = x[x[:, 0] < 0]
        error = (merged(net, net.spec.depth, linear_reads(net, x))(usual) - net(usual)).norm() / net(
            usual
        ).norm()
    assert error < 0.1


def test_a_strongly_coupled_chain_takes_work_and_more_work_undoes_more() -> None:
    torch.manual_seed(0)
    net = chain(0.5)
    little, more = (attack(net, "linear", train_tokens) for train_tokens in (512, 40_960))
    assert more.student_error < 0.7 * little.student_error
    assert more.cost == 10 and more.chain_error < 1e-9 and not more.undone


def test_a_random_start_is_a_fresh_swiglu_mlp_that_takes_nothing_but_outputs() -> None:
    torch.manual_seed(0)
    net = chain(0.5, act="relu")
    data = pairs(net)
    held = torch.arange(N, len(data))
    little, more = (fit(net, data, "random", train_tokens) for train_tokens in (2048, 20_480))
    assert more.spec == DLRSpec(D, 1, 1, more.spec.rank, "silu", gated=True)
    assert abs(more.spec.params - net.spec.params) <= 3 * 16 * D / 2  # half a tile of units: D is small
    errors = [measure(copy, *data.rows(held), CPU).rel_error for copy in (little, more)]
    assert errors[1] < 0.8 * errors[0] < 0.8
    other = chain(0.5, act="relu")  # the outputs are the same, so the copy is
    assert torch.equal(fit(other, data, "random", 2048).dlr_B, little.dlr_B)


def test_a_copy_depends_on_its_seed_and_the_chain_stays_as_it_is() -> None:
    net = chain(0.5)
    data = pairs(net)
    before = {name: p.clone() for name, p in net.named_parameters()}
    first, again, other = (fit(net, data, "linear", 512, seed) for seed in (3, 3, 4))
    assert torch.equal(first.dlr_A, again.dlr_A) and not torch.equal(first.dlr_A, other.dlr_A)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    with pytest.raises(DLRError, match="unknown init 'teacher'; one of linear, flat, random"):
        fit(net, data, "teacher", 512)


@pytest.mark.parametrize("group", [2, 3, 5])
def test_flops_of_the_linear_start_are_those_that_are_computed(group: int) -> None:
    """But for the inverse, which torch does not count."""
    net = DLRNet(DLRSpec(32, 1, 5, 16), dtype=torch.float32)
    net.assign({name: torch.randn_like(p) / 8 for name, p in net.named_parameters()})
    x = torch.randn(300, 32)
    maps = 5 - -(-5 // group)
    passed = 2 * (net.dlr_A.numel() + net.dlr_B.numel()) * len(x)
    counted = count(lambda: linear_reads(net, x, group)).flops
    assert counted == regression_flops(net.spec, len(x), group) - maps * 2 * 32**3 + passed
