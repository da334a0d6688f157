"""What a training step of each arm costs for each attack, by every policy: counted, and the promising ones timed."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from ..triton_kernels import backend
from .learning import policies, trainable
from .meters import Meter, now
from .report import StepCost
from .systems.model import NothingToTrain, measure_model

_PASSES = 2  # of inference in a step of MeZO
_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class Arm:
    """A model to be fine-tuned. mlps: names of the modules in the MLPs' places. deep: they are chains of several steps,
    which policies of their own serve."""

    name: str
    model: PreTrainedModel
    mlps: Sequence[str]
    deep: bool = False


def count_steps(
    arm: Arm,
    attacks: Sequence[str],
    shape: tuple[int, int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[StepCost]:
    """The rows of an arm, counted without data: a step on [sequences, n] tokens by every policy of systems.model, for
    every attack that has something to train. Of an attack the plain policy comes first."""
    for number, attack in enumerate(attacks):
        progress(number, len(attacks))
        yield from _mezo(arm, shape) if attack == "MeZO" else _trained(arm, attack, shape)
    progress(len(attacks), len(attacks))


def time_steps(
    arms: Callable[[], Iterable[Arm]],
    rows: Sequence[StepCost],
    shape: tuple[int, int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[StepCost]:
    """The rows of `count_steps` of all arms with seconds, on the models' device, of the promising ones: for each arm
    and attack the plain policy and those of the fewest FLOPs and of the fewest launches in a row.

    Seconds: of the step that `learning.fine_tune` takes, at a rate of 0, the median over rounds in which each steps
    once after a warm-up. arms() gives the arms anew for every round, so that one is in memory at a time. In rounds,
    because the slowest and the fastest hour of one machine differed by more (2.0) than the arms do (1.6).
    """
    groups: dict[tuple[str, str], list[StepCost]] = {}
    for row in rows:
        groups.setdefault((row.arm, row.attack), []).append(row)
    chosen = [
        row
        for group in groups.values()
        for row in dict.fromkeys(
            (group[0], min(group, key=lambda r: r.flops), min(group, key=lambda r: r.dependent))
        )
    ]
    laps: dict[StepCost, list[float]] = {row: [] for row in chosen}
    done, total = 0, _ROUNDS * len(chosen)
    for _ in range(_ROUNDS):
        for arm in arms():
            for row in (row for row in chosen if row.arm == arm.name):
                progress(done, total)
                laps[row].append(_seconds(arm, row, shape))
                done += 1
    progress(total, total)
    return [replace(row, seconds=median(laps[row])) if row in laps else row for row in rows]


def _trained(arm: Arm, attack: str, shape: tuple[int, int]) -> list[StepCost]:
    mode, ghost = _without_data(arm.model)
    rows = []
    for policy in policies(attack, locked=arm.deep):
        try:
            with mode:
                ids = torch.zeros(shape, dtype=torch.int64, device=arm.model.device)
                counts = measure_model(ghost, arm.mlps, policy, ids).counts
        except NothingToTrain:
            continue
        assert counts is not None
        rows.append(StepCost(
            arm.name, attack, policy.name, shape[0] * shape[1], counts.flops, counts.peak, counts.held,
            counts.forward.launches + counts.backward.launches, counts.dependent,
        ))  # fmt: skip
    return rows


def _seconds(arm: Arm, row: StepCost, shape: tuple[int, int]) -> float:
    """Of one step after another."""
    ids = torch.zeros(shape, dtype=torch.int64, device=arm.model.device)
    policy = None
    if row.attack != "MeZO":
        policy = next(p for p in policies(row.attack, locked=arm.deep) if p.name == row.policy)
    with trainable(arm.model, arm.mlps, row.attack, 0, policy) as step:
        for _ in range(2):
            began = now(arm.model.device)
            step(ids, 0.0)
            seconds = now(arm.model.device) - began
    return seconds


def _mezo(arm: Arm, shape: tuple[int, int]) -> list[StepCost]:
    def infer(model: PreTrainedModel) -> object:
        with backend("naive"):  # the others prepare weights, which change at every pass
            return model(
                input_ids=torch.zeros(shape, dtype=torch.int64, device=arm.model.device), use_cache=False
            )

    mode, ghost = _without_data(arm.model)
    meter = Meter()
    with mode, torch.no_grad(), meter:
        infer(ghost)
    counts = meter.take()
    return [
        StepCost(
            arm.name, "MeZO", "MeZO", shape[0] * shape[1], _PASSES * counts.flops, meter.peak, 0,
            _PASSES * counts.launches, _PASSES * counts.dependent,
        )
    ]  # fmt: skip


def _without_data(model: PreTrainedModel) -> tuple[FakeTensorMode, PreTrainedModel]:
    """A copy whose tensors have shapes alone, and the mode to run it in."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # tensors that are no parameters or buffers
    memo: dict[int, object] = {
        id(p): nn.Parameter(mode.from_tensor(p.detach()), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    memo |= {id(b): mode.from_tensor(b) for b in model.buffers()}
    return mode, copy.deepcopy(model, memo)
