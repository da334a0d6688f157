"""What a training step of each variant costs for each attack, by every strategy: counted, and the promising ones timed."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from ..common.timing import now
from ..triton_kernels import backend
from .learning import strategies, trainable
from .meters import Meter
from .report import StepCost
from .strategies.model import NothingToTrain, measure_model

_PASSES = 2  # of inference in a step of MeZO
_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class Variant:
    """A model to be fine-tuned. mlps: names of the modules in the MLPs' places. deep: they are chains of several steps,
    which strategies of their own serve."""

    name: str
    model: PreTrainedModel
    mlps: Sequence[str]
    deep: bool = False


def count_steps(
    variant: Variant,
    attacks: Sequence[str],
    shape: tuple[int, int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[StepCost]:
    """The rows of an variant, counted without data: a step on [sequences, n] tokens by every strategy of systems.model, for
    every attack that has something to train. Of an attack the plain strategy comes first."""
    for number, attack in enumerate(attacks):
        progress(number, len(attacks))
        yield from _mezo(variant, shape) if attack == "MeZO" else _trained(variant, attack, shape)
    progress(len(attacks), len(attacks))


def time_steps(
    variants: Callable[[], Iterable[Variant]],
    rows: Sequence[StepCost],
    shape: tuple[int, int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[StepCost]:
    """The rows of `count_steps` of all variants with seconds, on the models' device, of the promising ones: for each variant
    and attack the plain strategy and those of the fewest FLOPs and of the fewest launches in a row.

    Seconds: of the step that `learning.fine_tune` takes, at a rate of 0, the median over rounds in which each steps
    once after a warm-up. variants() gives the variants anew for every round, so that one is in memory at a time. In rounds,
    because the slowest and the fastest hour of one machine differed by more (2.0) than the variants do (1.6).
    """
    groups: dict[tuple[str, str], list[StepCost]] = {}
    for row in rows:
        groups.setdefault((row.variant, row.attack), []).append(row)
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
        for variant in variants():
            for row in (row for row in chosen if row.variant == variant.name):
                progress(done, total)
                laps[row].append(_seconds(variant, row, shape))
                done += 1
    progress(total, total)
    return [replace(row, seconds=median(laps[row])) if row in laps else row for row in rows]


def _trained(variant: Variant, attack: str, shape: tuple[int, int]) -> list[StepCost]:
    mode, ghost = _without_data(variant.model)
    rows = []
    for strategy in strategies(attack, locked=variant.deep):
        try:
            with mode:
                ids = torch.zeros(shape, dtype=torch.int64, device=variant.model.device)
                counts = measure_model(ghost, variant.mlps, strategy, ids).counts
        except NothingToTrain:
            continue
        assert counts is not None
        rows.append(StepCost(
            variant.name, attack, strategy.name, shape[0] * shape[1], counts.flops, counts.peak, counts.held,
            counts.forward.launches + counts.backward.launches, counts.dependent,
        ))  # fmt: skip
    return rows


def _seconds(variant: Variant, row: StepCost, shape: tuple[int, int]) -> float:
    """Of one step after another."""
    ids = torch.zeros(shape, dtype=torch.int64, device=variant.model.device)
    strategy = None
    if row.attack != "MeZO":
        strategy = next(p for p in strategies(row.attack, locked=variant.deep) if p.name == row.strategy)
    with trainable(variant.model, variant.mlps, row.attack, 0, strategy) as step:
        for _ in range(2):
            began = now(variant.model.device)
            step(ids, 0.0)
            seconds = now(variant.model.device) - began
    return seconds


def _mezo(variant: Variant, shape: tuple[int, int]) -> list[StepCost]:
    def infer(model: PreTrainedModel) -> object:
        with backend("naive"):  # the others prepare weights, which change at every pass
            return model(
                input_ids=torch.zeros(shape, dtype=torch.int64, device=variant.model.device), use_cache=False
            )

    mode, ghost = _without_data(variant.model)
    meter = Meter()
    with mode, torch.no_grad(), meter:
        infer(ghost)
    counts = meter.take()
    return [
        StepCost(
            variant.name, "MeZO", "MeZO", shape[0] * shape[1], _PASSES * counts.flops, meter.peak, 0,
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
