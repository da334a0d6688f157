"""Locked mixtures of experts in an audit: each expert's chain is attacked like any other, and stands among the rest."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from attacked import SMALL, context
from locked import lock_randomly
from tiny import VOCABULARY, save_tiny, tiny_model
from torch import Tensor

from dlr_lock import convert_model
from dlr_lock.audit import audit_model
from dlr_lock.audit.attacks.fine_tune import task_loss
from dlr_lock.audit.chains import Chain, by_chain, chains_of, in_places
from dlr_lock.audit.gradients import module_gradients
from dlr_lock.audit.meters import Meter, countable, step_tokens
from dlr_lock.audit.strategies.model import NothingToTrain, prepared
from dlr_lock.audit.strategies.table import model_strategies
from dlr_lock.audit.texts import invented_lines
from dlr_lock.common.hooks import frozen
from dlr_lock.convert.activations.capture import capture
from dlr_lock.convert.experts.routing import Mixture
from dlr_lock.convert.mlp_discovery import find_mlps
from dlr_lock.convert.redistill import flattened
from dlr_lock.triton_kernels import backend


def tokens(sequences: int = 4, n: int = 16) -> Tensor:
    return torch.randint(3, VOCABULARY, (sequences, n), generator=torch.Generator().manual_seed(3))


def locked_mixtral(kept: tuple[int, ...] = ()) -> tuple[Any, Any, list[Any]]:
    """Original, locked, its mixtures."""
    original = tiny_model("mixtral")
    mlps = find_mlps(original)
    locked = copy.deepcopy(original)
    lock_randomly(locked, kept=kept)
    return original, locked, mlps


def test_a_small_mixture_is_audited(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(invented_lines(40_000, 9)), encoding="utf-8")
    source = save_tiny("mixtral", tmp_path / "source")
    convert_model(
        source, tmp_path / "locked", data=str(text), tokens=2048, heldout=512, train_tokens=2048, batch=128, depth=3,
        redistill=0.0, sequence=32, device="cpu",
    )  # fmt: skip
    least = {"rates": 1, "seeds": 1, "attacks": "full", "experts": 3}
    report = audit_model(tmp_path / "locked", source, tmp_path / "audit", data=str(text), **SMALL | least)
    names = [f"model.layers.{layer}.mlp.experts" for layer in (0, 1)]
    assert [m.module.split(", expert ")[0] for m in report.modules] == [n for n in names for _ in range(3)]
    for name in names:  # three of four experts have most of the tokens, and each its part of a module's 2,048
        spent = [m.students[0].train_tokens for m in report.modules if m.module.startswith(name)]
        assert 2048 < sum(spent) < 2 * 2048 and len(set(spent)) > 1
        assert any(note.startswith(f"3 of 4 experts of {name} were distilled back") for note in report.notes)
    assert {round(s.share or 0, 2) for m in report.modules for s in m.students} == {0.5}
    assert all(0 < m.chain_error < 1 and m.gap > 0 and len(m.students) == 3 for m in report.modules)
    rows = {row.name: row for row in report.structural}
    assert report.recovers(rows["swap"]) < 1e-6 < report.recovers(rows["flatten"])
    undone = rows["redistilled, 0.5"]
    assert undone.flops and undone.seconds and undone.slots == "chain"  # the fourth expert's is one
    variants = "original", "locked", "redistilled, 0.5"
    assert {run.variant for run in report.runs} == {step.variant for step in report.steps} == {*variants}
    plain = {s.variant: s for s in report.steps if s.strategy == "plain"}
    assert plain["locked"].dependent > plain["original"].dependent and plain["locked"].seconds
    assert {g.name for g in report.gradients} >= {*names, f"{names[0]}, redistilled, 0.5"}
    assert report.asymmetries and report.depths and report.slot.startswith(f"an expert of {names[0]}")
    assert report.price is not None or any("no verdict" in note for note in report.notes)


@pytest.mark.parametrize("kept", [(), (1,)])
def test_a_net_in_a_chains_place_is_what_its_experts_tokens_get(
    kept: tuple[int, ...], tmp_path: Path
) -> None:
    _, locked, mlps = locked_mixtral(kept)
    chains = chains_of(mlps, locked)
    assert len(chains) == 2 * (4 - len(kept)) == len({chain.number for chain in chains})
    ids, mixture = tokens(), mlps[0]
    stream = capture(locked, [mixture], ids, max_memory=2**30, scratch=tmp_path, dtype=torch.float32)
    _, pairs = next(stream)
    assert pairs.routing is not None
    module = locked.get_submodule(mixture.module)

    def given(experts: Any) -> Tensor:
        with torch.no_grad():
            return experts(pairs.x, *pairs.routing)

    same = in_places(locked, {chain: chain.net(locked) for chain in chains})
    assert torch.allclose(given(same[mixture.module]), given(module), atol=1e-5)
    last = chains[3 - len(kept)]
    other = in_places(locked, {last: flattened(last.net(locked))})[mixture.module]
    moved = (given(other) - given(module)).abs().amax(1) > 1e-6
    assert torch.equal(moved, (pairs.routing.chosen == last.expert).any(1)) and moved.any()


def test_experts_targets_add_up_to_what_the_mixture_should_give(tmp_path: Path) -> None:
    original, _, mlps = locked_mixtral()
    ids, mixture = tokens(), mlps[1]
    stream = capture(original, [mixture], ids, max_memory=2**30, scratch=tmp_path, dtype=torch.float32)
    _, pairs = next(stream)
    assert isinstance(mixture, Mixture) and pairs.routing is not None
    pairs.y.add_(torch.randn(pairs.y.shape))  # what earlier chains left to correct
    wanted, total = pairs.y.clone(), torch.zeros_like(pairs.y)
    of = by_chain(original, mixture, pairs, 0, corrected=True)
    for expert in range(mixture.experts):
        rows, weight = pairs.routing.of(expert)
        own, train = of(Chain(mixture, expert))
        assert train == 0 and torch.equal(own.x, pairs.x[rows])
        total.index_add_(0, rows, own.y * weight[:, None])
    assert torch.allclose(total, wanted, atol=1e-4)


def test_every_strategy_gives_the_gradients_of_plain_autograd_through_experts() -> None:
    _, locked, mlps = locked_mixtral()
    places, ids = [mlp.module for mlp in mlps], step_tokens(locked, (2, 16))
    found: dict[str, list[Tensor]] = {}
    _, ghost = countable(locked)
    for strategy in model_strategies(locked=True):
        if strategy.trainable == "weights":
            with prepared(ghost, places, strategy) as trained:
                grads = torch.autograd.grad(task_loss(ghost, ids), trained, allow_unused=True)
                found[strategy.name] = [g for g in grads if g is not None]
    assert len(found) > 8
    for grads in found.values():
        for one, plain in zip(grads, found["plain"], strict=True):
            assert torch.allclose(one, plain, atol=1e-4 * plain.abs().max().item() + 1e-7)


def test_adapters_that_no_expert_takes_are_not_trained_twice() -> None:
    _, locked, mlps = locked_mixtral()
    adapters = next(s for s in model_strategies(locked=True) if s.trainable == "adapters")
    with pytest.raises(NothingToTrain, match="would train the attention alone"):
        prepared(locked, [mlp.module for mlp in mlps], adapters).__enter__()
    assert not any("forward" in vars(m) or "grouped" in vars(m) for m in locked.modules())


@pytest.mark.parametrize("arch", ["mixtral", "llama4_text"])
def test_gradients_of_mixtures_are_compared_by_one_routing(arch: str) -> None:
    original = tiny_model(arch)
    mlps = [mlp for mlp in find_mlps(original) if isinstance(mlp, Mixture)]
    random = copy.deepcopy(original)
    lock_randomly(random)
    work = context(original, random, mlps, tokens())
    far = list(module_gradients(work, {}, ""))
    work.locked = copy.deepcopy(original)
    near = list(module_gradients(work, {}, ""))
    assert [row.name for row in near] == [row.name for row in far] == [mlp.module for mlp in mlps]
    assert all(row.error < 1e-8 and row.cosine == pytest.approx(1, abs=1e-4) for row in near)
    assert all(row.error > 0.5 and row.cosine < 0.5 for row in far)


def test_a_model_with_experts_is_counted_as_it_is_routed() -> None:
    """The copy has the model's own tensors, and no expert's weights are copied for the tokens that it gets."""
    original, locked, mlps = locked_mixtral()
    ids = step_tokens(original, (2, 16))
    chains = [locked.get_submodule(mlp.module).spec.chain for mlp in mlps]
    sizes = [mlp.expert_params for mlp in mlps], [chain.params for chain in chains]
    for model, of_one in zip((original, locked), sizes, strict=True):
        before = model.config._experts_implementation
        _, ghost = countable(model)
        assert all(a is b for a, b in zip(ghost.parameters(), model.parameters(), strict=True))
        with frozen(ghost), frozen(model), backend("naive"), Meter() as meter:
            counted = ghost(input_ids=ids).logits
        with frozen(model):
            assert torch.allclose(counted, model(input_ids=ids).logits, atol=1e-4)
        assert model.config._experts_implementation == before
        assert meter.take().flops > 2 * 2 * 32 * sum(of_one)  # two experts a token
        assert meter.peak < 4 * mlps[0].params
