"""Fine-tuning as an attacker does it: it learns, it finds its rate, and it leaves the model as it was."""

import math
from dataclasses import replace

import pytest
import torch
from attacked import MLPS, locked_llama
from tiny import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from dlr_lock.audit.attacks import TRAINING_ATTACKS
from dlr_lock.audit.attacks.fine_tune import Tuning, fine_tune, lost, sweep
from dlr_lock.audit.attacks.gradient import GradientAttack
from dlr_lock.audit.context import ModelVariant
from dlr_lock.audit.report import Run
from dlr_lock.audit.texts import Text
from dlr_lock.common.dtypes import products_in
from dlr_lock.common.errors import DLRError

PLAN = Tuning(tokens=1536, batch=64, looks=4, seeds=2, rates=4)


def counting() -> Text:
    """Sequences that count up from anywhere: learnt within a few steps."""
    ids = (torch.arange(40)[:, None] * 7 + torch.arange(16)) % 41
    return Text(ids[:32], ids[32:], "counting")


def tune(
    model: PreTrainedModel, attack: str, rate: float | None = None, seed: int = 0, rival: Run | None = None
) -> Run:
    chosen = TRAINING_ATTACKS[attack]
    neutral = torch.arange(32).view(2, 16)
    rate = rate or 30 * chosen.first_rate
    return fine_tune(
        chosen,
        ModelVariant("locked", model, MLPS, MLPS),
        counting(),
        neutral,
        PLAN,
        rate=rate,
        seed=seed,
        rival=rival,
    )


@pytest.mark.parametrize("attack", TRAINING_ATTACKS)
@pytest.mark.parametrize("coarse", [False, True])
def test_a_run(attack: str, coarse: bool) -> None:
    """Also as a CPU with bfloat16 instructions runs a model that is wide enough."""
    dtype = torch.bfloat16 if coarse else torch.float32
    torch.manual_seed(5)
    model = locked_llama()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with products_in(dtype):
        torch.manual_seed(1)
        run = tune(model, attack)
        torch.manual_seed(1)
        again = tune(model, attack)
    assert replace(run, seconds=0) == replace(again, seconds=0)
    assert run.tokens == [0, 384, 768, 1152, 1536] and len(run.losses) == 5 and not run.diverged
    if attack != "MeZO":  # which wants thousands of steps
        assert run.losses[-1] < run.losses[0] - 0.05
    assert run.neutral[1] is not None and run.neutral[1] != run.neutral[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in vars(m) and not m._forward_hooks for m in model.modules())
    assert not any(p.requires_grad or p.grad is not None for n, p in model.named_parameters() if "dlr_" in n)


def test_what_is_trained() -> None:
    for attack in TRAINING_ATTACKS.values():
        if not isinstance(attack, GradientAttack):
            continue
        model = locked_llama()
        before = {name: p.clone() for name, p in model.named_parameters()}
        ids = torch.randint(320, (2, 16))
        with attack.stepping(ModelVariant("locked", model, MLPS, MLPS), 0) as step:
            loss = model(input_ids=ids, labels=ids).loss.item()
            step(ids, 1e-2)
            step(ids, 1e-2)  # the adapters' first step moves V alone
            changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
            assert model(input_ids=ids, labels=ids).loss.item() != loss
        outside = {name for name in before if not name.startswith(tuple(f"{mlp}." for mlp in MLPS))}
        assert changed == {"full": set(before), "outside": outside}.get(attack.name, set())


@pytest.mark.parametrize("attack", ["full", "outside"])
def test_a_matrix_moves_in_proportion_to_its_size(attack: str) -> None:
    """A chain's B is small: at one rate for all weights it is wrecked, or nothing else learns."""
    model, ids, rate = tiny_model("llama"), torch.randint(320, (2, 16)), 1e-3
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.o_proj.weight").mul_(0.05)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with TRAINING_ATTACKS[attack].stepping(ModelVariant("original", model, MLPS[:1], MLPS[:1]), 0) as step:
        step(ids, rate)  # AdamW's first: each number moves by its rate
        moved = {n: (p.detach() - before[n]).abs().max().item() for n, p in model.named_parameters()}
    moved = {name: most for name, most in moved.items() if most}
    sizes = {name: before[name].square().mean().sqrt().item() for name in moved if before[name].dim() > 1}
    median = sorted(sizes.values())[len(sizes) // 2]
    assert len(sizes) > 5 and min(sizes.values()) < 0.1 * median
    for name, most in moved.items():
        assert most == pytest.approx(rate * sizes.get(name, median) / median, rel=0.1), name


def test_a_run_that_diverges_says_so_and_leaves_the_model() -> None:
    model = locked_llama()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    run = tune(model, "full", rate=1e30)
    assert run.diverged and run.neutral[1] is None and len(run.losses) < 5
    assert all(math.isfinite(loss) for loss in run.losses)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_mezo_moves_along_z_by_the_slope() -> None:
    """Against autograd in float64: the change is -rate * (g . z) z for a normal z, a new one at each step."""
    torch.manual_seed(3)  # of random models one in eight is too rough for a slope over 1e-3 z
    model = locked_llama().double()
    model.requires_grad_(False)
    ids = torch.randint(320, (2, 16))
    weights = list(model.parameters())
    variant = ModelVariant("locked", model, MLPS, MLPS)
    with TRAINING_ATTACKS["full"].stepping(variant, 0) as _:
        gradient = _flat(torch.autograd.grad(model(input_ids=ids, labels=ids).loss, weights))
    rate, moves = 1e-7, []
    for seed in range(8):
        with TRAINING_ATTACKS["MeZO"].stepping(variant, seed) as step:
            for _ in range(2):
                start = _flat(weights).clone()
                step(ids, rate)
                moves.append(_flat(weights) - start)
    # -rate (g . z) z . g = -rate (g . z)^2 and |rate (g . z) z|^2 / (rate (g . z))^2 = |z|^2, about n. Only where z is
    # not nearly across the gradient: a difference of losses is all curvature there.
    found = 0
    for move in moves:
        slope = math.sqrt(max(0.0, -(gradient @ move).item() / rate))
        if slope > gradient.norm():
            z = move / (rate * slope)
            assert abs(z.square().mean().item() - 1) < 0.05 and abs(z.mean().item()) < 0.05
            found += 1
    assert found
    units = torch.stack([move / move.norm() for move in moves])
    assert (units @ units.T - torch.eye(len(moves))).abs().max() < 0.05


def _flat(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def test_every_sequence_is_seen_once_before_any_twice() -> None:
    seen: list[Tensor] = []
    model, task = locked_llama(), counting()
    inner = model.forward

    def forward(*args: object, **kwargs: object) -> object:
        if kwargs.get("labels") is not None:
            seen.append(kwargs["input_ids"])
        return inner(*args, **kwargs)

    model.forward = forward
    variant = ModelVariant("locked", model, MLPS, MLPS)
    fine_tune(TRAINING_ATTACKS["full"], variant, task, task.heldout, PLAN, rate=1e-5, seed=0)
    first = torch.cat(seen)[:32]
    assert torch.equal(first[:, 0].sort().values, task.train[:, 0].sort().values)
    assert sum(len(ids) for ids in seen) * 16 == PLAN.tokens


@pytest.mark.parametrize("optimum", [-3, -1, 0, 1, 3])
def test_a_sweep_finds_the_best_rate(optimum: int) -> None:
    made: list[tuple[int, int]] = []

    def make(rate: float, seed: int, rival: Run | None) -> Run:
        at = round(2 * math.log10(rate / 1e-4))
        made.append((at, seed))
        assert (rival is None) == (len(made) == 1 or seed > 7)
        diverged = at > optimum + 1
        losses = [9.0] if diverged else [9.0, 5.0 + abs(at - optimum) + (seed - 7) / 2]
        return Run("locked", "full", rate, seed, 1, [0, 1][: len(losses)], losses, (1, 1), 0.0, diverged)

    runs = sweep(make, 1e-4, Tuning(1, 1, 1, 3, rates=9), 7)
    best = [run for run in runs if run.best]
    assert [round(2 * math.log10(run.rate / 1e-4)) for run in best] == [optimum] * 3
    assert [run.seed for run in best] == [7, 8, 9]
    assert len(runs) == len(made) == len(set(made))  # nothing twice, nothing forgotten
    assert {at for at, _ in made} >= {optimum - 1, optimum + 1} or optimum == 0


def test_a_sweep_stops_at_its_limit() -> None:
    def make(rate: float, seed: int, rival: Run | None) -> Run:
        return Run("locked", "full", rate, seed, 1, [0, 1], [9.0, -rate], (1, 1), 0.0)

    runs = sweep(make, 1.0, Tuning(1, 1, 1, 1, rates=3), 0)
    assert len(runs) == 3 and runs[0].best and runs[0].rate == max(run.rate for run in runs)


@pytest.mark.parametrize(("apart", "count"), [(0.07, 2), (0.09, 3)])
def test_two_seeds_that_gained_the_same_have_no_third(apart: float, count: int) -> None:
    def make(rate: float, seed: int, rival: Run | None) -> Run:
        return Run("locked", "full", rate, seed, 1, [0, 1], [9.0, 5.0 + seed * apart], (1, 1), 0.0)

    runs = sweep(make, 1e-4, Tuning(1, 1, 1, 3, rates=1), 0)
    assert [run.seed for run in runs] == list(range(count)) and all(run.best for run in runs)


def test_a_run_that_is_plainly_behind_is_given_up() -> None:
    """At two of its four looks; it can never be the best one then."""
    model = locked_llama()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    rival = tune(model, "full")
    run = tune(model, "full", rate=1e-9, rival=rival)
    assert run.given_up and not run.diverged and run.neutral[1] is None
    assert run.tokens == [0, 384, 768] and min(run.losses) > min(rival.losses)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = tune(model, "full", rival=rival)
    assert not again.given_up and again.losses == rival.losses and again.neutral == rival.neutral


@pytest.mark.parametrize(
    ("losses", "behind"),
    [
        ([9.0, 8.9], False),  # before a third of the looks
        ([9.0, 8.9, 7.5], True),
        ([9.0, 8.9, 7.3], False),  # by less than a fifth of 2.0, at half of the run
        ([9.0, 6.9, 8.5], False),  # was better than the other ever was by then
        ([9.0, 8.9, 8.8, 6.1], False),  # the other got worse since
    ],
)
def test_what_plainly_behind_is(losses: list[float], behind: bool) -> None:
    rival = Run("locked", "full", 1e-4, 0, 1, [0, 1, 2, 3, 4], [9.0, 8.0, 7.0, 8.0, 6.0], (1, 1), 0.0)
    assert lost(losses, rival, 4) == behind
    assert not lost(losses, None, 4) and not lost(losses, replace(rival, diverged=True), 4)


def test_nothing_to_train() -> None:
    variant, task = ModelVariant("a", tiny_model("llama"), [], []), counting()
    with pytest.raises(DLRError, match="nothing to train"):
        fine_tune(TRAINING_ATTACKS["PEFT"], variant, task, task.heldout, PLAN, rate=1e-3, seed=0)
