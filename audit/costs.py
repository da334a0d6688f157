"""What a training step of each arm costs for each attack, by every policy: counted, and the promising ones timed."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from ..triton_kernels import backend
from .learning import AIMS, trainable
from .meters import Meter, now
from .report import StepCost
from .systems.model import ModelPolicy, NothingToTrain, measure_model, model_policies

_PASSES = 2  # of inference in a step of MeZO


@dataclass(frozen=True, eq=False)
class Arm:
    """A model to be fine-tuned. mlps: names of the modules in the MLPs' places. deep: they are chains of several steps,
    which policies of their own serve."""

    name: str
    model: PreTrainedModel
    mlps: Sequence[str]
    deep: bool = False


def step_costs(
    arm: Arm,
    attacks: Sequence[str],
    shape: tuple[int, int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[StepCost]:
    """The rows of an arm: a step on [sequences, n] tokens by every policy of systems.model, for every attack that has
    something to train.

    All are counted, without data. Timed, on the model's device, are for each attack the plain policy and those of the
    fewest FLOPs and of the fewest launches in a row.
    """
    for number, attack in enumerate(attacks):
        progress(number, len(attacks))
        yield from _mezo(arm, shape) if attack == "MeZO" else _trained(arm, attack, shape)
    progress(len(attacks), len(attacks))


def _trained(arm: Arm, attack: str, shape: tuple[int, int]) -> list[StepCost]:
    mode, ghost = _without_data(arm.model)
    rows: dict[ModelPolicy, StepCost] = {}
    for policy in model_policies(locked=arm.deep):
        if policy.aim != AIMS[attack]:
            continue
        try:
            with mode:
                ids = torch.zeros(shape, dtype=torch.int64, device=arm.model.device)
                counts = measure_model(ghost, arm.mlps, policy, ids).counts
        except NothingToTrain:
            continue
        assert counts is not None
        rows[policy] = StepCost(
            arm.name, attack, policy.name, shape[0] * shape[1], counts.flops, counts.peak, counts.held,
            counts.forward.launches + counts.backward.launches, counts.dependent,
        )  # fmt: skip
    if not rows:
        return []
    # plain comes first
    timed = {
        next(iter(rows)),
        min(rows, key=lambda p: rows[p].flops),
        min(rows, key=lambda p: rows[p].dependent),
    }
    for policy in timed:
        rows[policy] = replace(rows[policy], seconds=_seconds(arm, attack, shape, policy))
    return list(rows.values())


def _seconds(arm: Arm, attack: str, shape: tuple[int, int], policy: ModelPolicy | None = None) -> float:
    """Of the step that `learning.fine_tune` takes, at a rate of 0: the median of three after a warm-up."""
    ids = torch.zeros(shape, dtype=torch.int64, device=arm.model.device)
    laps = []
    with trainable(arm.model, arm.mlps, attack, 0, policy) as step:
        for _ in range(4):
            began = now(arm.model.device)
            step(ids, 0.0)
            laps.append(now(arm.model.device) - began)
    return median(laps[1:])


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
            _seconds(arm, "MeZO", shape),
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
