"""Attacks on the structure: each is the function that it says, in float64, and tells a weak lock from a strong one."""

import copy
from typing import Any

import pytest
import torch
from attacked import context
from tiny import VOCABULARY, tiny_model
from torch import Tensor

from dlr_lock.audit.attacks.structural import (
    dropped,
    merged,
    structural_attacks,
    structural_rows,
    swapped,
    truncated,
)
from dlr_lock.convert.end_to_end import with_chains
from dlr_lock.convert.evaluate import Evaluation, compare, distance_of, measure, relative_error
from dlr_lock.convert.mlp_discovery import find_mlps
from dlr_lock.convert.mlp_matching import MLP
from dlr_lock.convert.redistill import flattened
from dlr_lock.runtime import DLRNet, DLRSpec, lock
from dlr_lock.triton_kernels import ACTIVATIONS, chain_reference

D, T = 48, 64
CHAINS = {
    "single": DLRSpec(D, 1, 7, 16),
    "lanes": DLRSpec(D, 3, 4, 32, act="gelu"),
    "gated": DLRSpec(D, 2, 5, 16, gated=True),
}
every_chain = pytest.mark.parametrize("spec", CHAINS.values(), ids=CHAINS)


def chain(spec: DLRSpec, coupling: float = 1.0, dtype: torch.dtype = torch.float32) -> DLRNet:
    """Random; updates are about `coupling` of the state, and y is about as large as x whatever the coupling."""
    net = DLRNet(spec, dtype=dtype)
    weights = {name: torch.randn(spec.weight_shape) for name in net.weight_names(spec)}
    for name, w in weights.items():
        w *= coupling * (spec.depth * spec.rank) ** -0.5 if name == "dlr_B" else spec.hidden_size**-0.5
    vectors = {
        "dlr_scale": torch.rand(spec.hidden_size) / coupling,
        "dlr_bias": 0.1 * torch.randn(spec.hidden_size),
    }
    net.assign(weights | vectors)
    return net


def by_hand(net: DLRNet, x: Tensor, group: int = 1, keep: int = 1, factor: float = 1.0) -> Tensor:
    """The chain in float64, a unit at a time, where `group` steps in a row read the state of the first of them and
    only every `keep`-th step is there, writing `factor` times as much."""
    act = ACTIVATIONS[net.spec.act]
    A, B, scale, bias = (w.double() for w in (net.dlr_A, net.dlr_B, net.dlr_scale, net.dlr_bias))
    x = x.double()
    total = torch.zeros_like(x)
    for lane in range(net.spec.lanes):
        z, read = x.clone(), x.clone()
        for number, k in enumerate(range(0, net.spec.depth, keep)):
            if number % group == 0:
                read = z.clone()
            for unit in range(net.spec.rank):
                h = read @ A[lane, k, unit]
                h = act(h) if net.dlr_G is None else act(read @ net.dlr_G[lane, k, unit].double()) * h
                z = z + factor * h[:, None] * B[lane, k, unit]
        total += z - x
    return scale * total + bias


def output(net: DLRNet, x: Tensor) -> Tensor:
    """In float64, by the definition, from the float32 weights that the attack made."""
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    return chain_reference(x.double(), net.chain.to(x.device, torch.float64))


def same(got: Tensor, wanted: Tensor) -> None:
    assert ((got - wanted).norm() / wanted.norm()).item() < 1e-6


@every_chain
@pytest.mark.parametrize("group", [1, 2, 3, 4, 100])
def test_merged_steps_read_the_state_of_the_first_of_them(spec: DLRSpec, group: int) -> None:
    net, x = chain(spec), torch.randn(T, D)
    attacked = merged(net, group)
    same(output(attacked, x), by_hand(net, x, group))
    group = min(group, spec.depth)
    assert attacked.spec.weight_shape == (spec.lanes, -(-spec.depth // group), group * spec.rank, D)


@every_chain
def test_one_step_at_a_time_is_the_chain_and_all_at_once_is_the_flattened_one(spec: DLRSpec) -> None:
    net, x = chain(spec), torch.randn(T, D)
    same(output(merged(net, 1), x), by_hand(net, x))
    same(output(merged(net, spec.depth), x), output(flattened(net), x))
    same(output(flattened(net), x), by_hand(net, x, group=spec.depth))
    assert flattened(net).spec.weight_shape == (1, 1, spec.lanes * spec.depth * spec.rank, D)


@pytest.mark.parametrize("gated", [False, True])
def test_the_units_that_fill_up_a_merge_are_exactly_zero(gated: bool) -> None:
    net = chain(DLRSpec(D, 2, 5, 16, gated=gated))
    attacked = merged(net, 3)  # a group of 3 steps and one of 2
    for name in net.weight_names(net.spec):
        rows, own = getattr(attacked, name), getattr(net, name)
        assert torch.equal(rows[:, 1, :32], own[:, 3:].reshape(2, 32, D))
        assert not rows[:, 1, 32:].any() and rows[:, 1, 32:].shape == (2, 16, D)


@every_chain
def test_half_of_the_steps_write_twice_as_much(spec: DLRSpec) -> None:
    net, x = chain(spec), torch.randn(T, D)
    kept = (spec.depth + 1) // 2
    attacked = dropped(net)
    assert attacked.spec.depth == kept
    same(output(attacked, x), by_hand(net, x, keep=2, factor=spec.depth / kept))
    even = chain(DLRSpec(D, 1, 4, 16))
    assert torch.equal(dropped(even).dlr_B, 2 * even.dlr_B[:, [0, 2]])


@every_chain
def test_truncation_keeps_the_largest_singular_values(spec: DLRSpec) -> None:
    net, x = chain(spec), torch.randn(T, D)
    same(output(truncated(net, 1.0), x), output(flattened(net), x))
    half = truncated(net, 0.5)
    for name in net.weight_names(spec):
        before, after = (
            torch.linalg.svdvals(getattr(n, name)[0, 0].double()) for n in (flattened(net), half)
        )
        count = len(before) // 2
        torch.testing.assert_close(after[:count], before[:count], rtol=1e-5, atol=0)
        assert after[count:].max() < 1e-5 * before[0]
    assert relative_error(output(half, x), output(flattened(net), x)).mean() > 0.01


@every_chain
def test_flattening_recovers_a_weak_lock_and_fails_on_a_strong_one(spec: DLRSpec) -> None:
    x = torch.randn(T, D)
    weak, strong = (chain(spec, coupling) for coupling in (1e-3, 1.3))
    assert 0.5 < measure(strong, x, x, torch.device("cpu")).coupling < 5
    errors = [relative_error(output(flattened(n), x), by_hand(n, x)).mean().item() for n in (weak, strong)]
    assert errors[0] < 1e-5 and errors[1] > 0.12


def test_attacks_want_steps_to_attack_and_leave_the_chain_alone() -> None:
    assert [a.name for a in structural_attacks(9)] == [
        "flatten", "merge 2", "merge 4", "merge 8", "drop every 2nd", "svd 1/2",
    ]  # fmt: skip
    assert [a.name for a in structural_attacks(2)] == ["flatten", "drop every 2nd", "svd 1/2"]
    assert [a.name for a in structural_attacks(1)] == ["flatten", "svd 1/2"]
    net = chain(CHAINS["lanes"], dtype=torch.bfloat16)
    before = copy.deepcopy(net.state_dict())
    for attack in structural_attacks(4):
        attacked = attack.change(net)
        assert output(attacked, torch.randn(4, D)).isfinite().all()
        for p in attacked.parameters():
            p.zero_()  # it shares no memory with the chain
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def models(arch: str, coupling: float = 1.0) -> tuple[Any, Any, list[MLP], Tensor]:
    """Original, locked as a conversion locks it, its MLPs, and tokens; MLPs of two sizes of chain."""
    original = tiny_model(arch, layers=2)
    mlps = find_mlps(original)
    chains = {
        mlp.module: chain(DLRSpec(mlp.hidden_size, 1, 5 - at, 16), coupling) for at, mlp in enumerate(mlps)
    }
    locked = copy.deepcopy(original)
    lock(locked, chains, [name for mlp in mlps for name in mlp.identity])
    return original, locked, mlps, torch.randint(3, VOCABULARY, (3, 24))


@pytest.mark.parametrize("arch", ["llama", "opt", "bert", "bloom"])
def test_every_attack_on_a_model_is_measured_against_the_original(arch: str) -> None:
    original, locked, mlps, tokens = models(arch)
    before = [copy.deepcopy(m.state_dict()) for m in (original, locked)]
    parts = [list(map(type, m.modules())) for m in (original, locked)]
    said: list[tuple[str, int, int]] = []
    rows = list(
        structural_rows(context(original, locked, mlps, tokens, progress=lambda *at: said.append(at)))
    )
    names = ["flatten", "merge 2", "merge 4", "drop every 2nd", "svd 1/2", "swap"]
    assert [row.name for row in rows] == names
    assert [row.slots for row in rows] == ["MLP", "chain", "chain", "chain", "MLP", "MLP"]
    assert {what for what, _, _ in said} == {f"evaluating {name}" for name in names}

    flat = {mlp.module: flattened(locked.get_submodule(mlp.module)) for mlp in mlps}
    wanted = compare(with_chains(original, flat, [n for m in mlps for n in m.identity]), original, tokens)
    assert distance_of(rows[0].evaluation) == pytest.approx(distance_of(wanted), rel=1e-3)
    own = distance_of(compare(locked, original, tokens))
    assert own > 0.01 and all(distance_of(row.evaluation) > 0.01 for row in rows[:-1])
    # nothing but the chains was changed, so the original's MLPs bring the original back, exactly
    assert distance_of(rows[-1].evaluation) == pytest.approx(0, abs=1e-9)
    if isinstance(rows[-1].evaluation, Evaluation):
        assert rows[-1].evaluation.loss_gap == 0 and rows[-1].evaluation.flips == 0

    for model, state, types in zip((original, locked), before, parts, strict=True):
        assert list(map(type, model.modules())) == types
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_swap_shows_what_else_was_changed() -> None:
    original, locked, mlps, tokens = models("opt")
    locked.get_input_embeddings().weight.data.mul_(1.5)
    assert distance_of(compare(swapped(locked, original, mlps), original, tokens)) > 1e-3


def test_merging_a_weak_lock_costs_nothing() -> None:
    original, locked, mlps, tokens = models("llama", coupling=1e-4)
    own = distance_of(compare(locked, original, tokens))
    rows = {
        row.name: distance_of(row.evaluation)
        for row in structural_rows(context(original, locked, mlps, tokens))
    }
    for name in ("flatten", "merge 2", "merge 4"):
        assert rows[name] == pytest.approx(own, rel=1e-2)
