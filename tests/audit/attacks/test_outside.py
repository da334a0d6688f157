"""The attack that trains all but the chains."""

import pytest
import torch
from attacked import MLPS, locked_llama
from tiny import tiny_model

from dlr_lock.audit.attacks import TRAINING_ATTACKS
from dlr_lock.audit.attacks.fine_tune import task_loss
from dlr_lock.audit.context import ModelVariant
from dlr_lock.audit.strategies.table import model_strategies

OUTSIDE, FULL = TRAINING_ATTACKS["outside"], TRAINING_ATTACKS["full"]


@pytest.mark.parametrize("locked", [True, False])
def test_chains_stay_and_all_else_learns(locked: bool) -> None:
    model = locked_llama(lanes=2) if locked else tiny_model("llama")
    variant = ModelVariant("a model", model, MLPS, deep=locked)
    ids = torch.randint(320, (2, 9))
    inside = {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{m}." for m in MLPS))}
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


def test_gradients_are_autograds_by_every_strategy_and_cost_less_than_those_of_all_weights() -> None:
    model, ids = locked_llama(lanes=2).double(), torch.randint(320, (2, 9))
    plain = None
    for strategy in [s for s in model_strategies(locked=True) if s.trainable == "weights"]:
        with OUTSIDE.trained(model, MLPS, strategy) as weights:  # type: ignore[attr-defined]
            got = torch.autograd.grad(task_loss(model, ids), weights)
        plain = plain or got
        for a, b in zip(got, plain, strict=True):
            assert (a - b).norm() <= 1e-10 * (1e-6 + b.norm()), strategy.name
    variant = ModelVariant("locked", locked_llama(lanes=2), MLPS, deep=True)
    costs = [
        {row.strategy: row.flops for row in attack.count_steps(variant, (2, 32))}
        for attack in (OUTSIDE, FULL)
    ]
    assert costs[0].keys() == costs[1].keys()
    assert costs[0]["plain"] < 0.9 * costs[1]["plain"]
