"""What a training step of each arm costs for each attack, by every policy: counted, and the promising ones timed."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from ..runtime import DLRError
from ..triton_kernels import backend
from .learning import AIMS
from .meters import Meter, median_seconds, time_step
from .report import StepCost
from .systems.model import ModelPolicy, measure_model, model_policies, prepared

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
    fewest FLOPs and of the fewest launches in a row: one step after a warm-up.
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
        except DLRError:  # nothing to adapt, or no numbered layer to checkpoint
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
    ids = torch.zeros(shape, dtype=torch.int64, device=arm.model.device)
    for policy in timed:
        with prepared(arm.model, arm.mlps, policy) as trained:
            seconds = time_step(
                lambda x: arm.model(input_ids=x, labels=x, use_cache=False).loss, ids, trained, repeats=1
            )
        rows[policy] = replace(rows[policy], seconds=seconds.step)
    return list(rows.values())


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
            _PASSES * median_seconds(lambda: infer(arm.model), arm.model.device, repeats=1),
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
