"""The attacks that leave the chains alone, and train the rest or its adapters."""

import pytest
import torch
from attacked import MLPS, locked_llama
from tiny import tiny_model
from torch import nn

from dlr_lock.audit.attacks import TRAINING_ATTACKS
from dlr_lock.audit.attacks.fine_tune import task_loss
from dlr_lock.audit.context import ModelVariant
from dlr_lock.audit.strategies.model import prepared
from dlr_lock.audit.strategies.table import model_strategies
from dlr_lock.runtime.quantizer import replace_module

OUTSIDE, FULL, PEFT = (TRAINING_ATTACKS[name] for name in ("outside", "full", "PEFT"))
LOCKED = MLPS[1:]  # the first MLP stays an MLP, which an attacker trains like all else


def model_of(locked: bool) -> nn.Module:
    if not locked:
        return tiny_model("llama")
    model = locked_llama(lanes=2)
    replace_module(model, MLPS[0], tiny_model("llama").get_submodule(MLPS[0]))
    return model


@pytest.mark.parametrize("locked", [True, False])
def test_the_locked_places_stay_and_all_else_learns(locked: bool) -> None:
    model = model_of(locked)
    variant = ModelVariant("a model", model, MLPS, LOCKED, deep=locked)
    ids = torch.randint(320, (2, 9))
    inside = {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{m}." for m in LOCKED))}
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    wanted = [(weight, weight.requires_grad) for weight in model.parameters()]
    assert 0 < len(inside) < len(before)
    with torch.no_grad():
        start = task_loss(model, ids).item()
    with OUTSIDE.stepping(variant, 0) as step:
        for _ in range(3):
            step(ids, 1e-3)
        moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
        assert task_loss(model, ids).item() < start
    assert moved == set(before) - inside
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert all(weight.requires_grad == was for weight, was in wanted)


@pytest.mark.parametrize("locked", [True, False])
def test_adapters_are_on_all_that_is_linear_but_in_locked_places(locked: bool) -> None:
    model, ids = model_of(locked), torch.randint(320, (2, 9))
    variant = ModelVariant("a model", model, MLPS, LOCKED, deep=locked)
    with PEFT.prepared(variant, 0) as (adapters, step):
        assert len(adapters) == 2 * (
            2 * 4 + 3
        )  # V, U of q, k, v, o of two layers, and of the MLP that is one
        with torch.no_grad():
            start = task_loss(model, ids).item()
        for _ in range(3):
            step(ids, 1e-2)
        with torch.no_grad():
            assert task_loss(model, ids).item() < start
    with torch.no_grad():
        assert task_loss(model, ids).item() == start


@pytest.mark.parametrize("trainable", ["weights", "adapters"])
def test_gradients_are_autograds_by_every_strategy_and_cost_less_than_with_the_chains(trainable: str) -> None:
    model, ids = model_of(True).double(), torch.randint(320, (2, 9))
    plain = None
    for strategy in [s for s in model_strategies(locked=True) if s.trainable == trainable]:
        torch.manual_seed(0)  # of the adapters
        with prepared(model, MLPS, strategy, LOCKED) as trained:
            got = torch.autograd.grad(task_loss(model, ids), trained)
        plain = plain or got
        for a, b in zip(got, plain, strict=True):
            assert (a - b).norm() <= 1e-10 * (1e-6 + b.norm()), strategy.name
    variant = ModelVariant("locked", model_of(True), MLPS, LOCKED, deep=True)
    costs = [
        {row.strategy: row.flops for row in attack.count_steps(variant, (2, 32))}
        for attack in ((OUTSIDE, FULL) if trainable == "weights" else (PEFT, TRAINING_ATTACKS["LoRA"]))
    ]
    assert costs[0].keys() == costs[1].keys()
    first = next(iter(costs[0]))
    assert costs[0][first] < 0.98 * costs[1][first]
