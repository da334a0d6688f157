"""The end-to-end phase of a conversion: measured before and after, and dropped where it makes the lock weaker."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..runtime import DLRError, DLRNet
from .capture import capture
from .endtoend import EndToEnd, flatten_gaps, train_together, with_chains
from .evaluate import Evaluation, StateEvaluation, compare, distance_of
from .fidelity import LOCKED_GAP, measure
from .mlps import MLP
from .modules import Modules, Progress, attacked
from .options import Options
from .report import ModuleReport, Together
from .text import CalibrationText
from .unlock import Unlocking

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEPT_GAP = 0.95  # share of the smallest flatten gap that the phase must leave
_KEPT_ERROR = 0.9  # share of the error that an attacker's copy has against the chain


def finish_together(
    model: PreTrainedModel,
    mlps: list[MLP],
    modules: Modules,
    text: CalibrationText,
    options: Options,
    scratch: Path,
    progress: Progress,
) -> Together | None:
    """The phase that options.together asks for, which changes modules.chains; None where none was asked for, or
    where it was dropped, which is noted. scratch: as for `capture`."""
    if not options.together:
        return None
    started = time.monotonic()
    identity = [name for mlp in mlps for name in mlp.identity]

    def figures(what: str) -> tuple[Evaluation | StateEvaluation, dict[str, float]]:
        locked = with_chains(model, modules.chains, identity)
        evaluation = compare(locked, model, text.heldout, partial(progress, f"measuring {what}"))
        return evaluation, flatten_gaps(locked, modules.chains, text.heldout)

    before, fitted = figures("the modules"), modules.chains
    try:
        modules.chains = train_together(
            model,
            fitted,
            identity,
            text.train,
            EndToEnd(options.together, seed=options.seed),
            progress=partial(progress, "end-to-end phase"),
        )
        after = figures("the end-to-end phase")
    except DLRError as error:
        modules.chains = fitted
        modules.notes.append(f"the end-to-end phase was dropped: {error}")
        return None
    weakest = min(after[1], key=lambda name: after[1][name])
    done = Together(
        options.together,
        time.monotonic() - started,
        before[0],
        after[0],
        min(before[1].values()),
        min(after[1].values()),
        weakest,
    )
    weaker = _unlocked(before[1], after[1]) or _weaker(done)
    if not weaker and options.unlock:
        mlp, report = next(
            pair for pair in zip(mlps, modules.reports, strict=True) if pair[0].module == weakest
        )
        nets = {"before": fitted[weakest], "after": modules.chains[weakest]}
        try:
            attacks = _attacked(model, mlp, report, nets, text, options, scratch, progress)
        except DLRError as error:  # it says nothing of the chains
            modules.notes.append(f"the attack on {weakest} after the end-to-end phase failed: {error}")
        else:
            done = replace(done, unlocking_before=attacks[0], unlocking_after=attacks[1])
            weaker = _weaker(done)
    if weaker:
        modules.chains = fitted
        modules.notes.append(f"the end-to-end phase was dropped, for it {weaker}")
        return None
    return done


def _attacked(
    model: PreTrainedModel,
    mlp: MLP,
    report: ModuleReport,
    nets: dict[str, DLRNet],
    text: CalibrationText,
    options: Options,
    scratch: Path,
    progress: Progress,
) -> tuple[Unlocking, Unlocking]:
    """The attack on one module's chain before and after the phase, on the original's activations."""
    train, device = text.train.numel(), torch.device(str(options.device))
    done = []
    for _, pairs in capture(
        model,
        [mlp],
        torch.cat([text.train, text.heldout]),
        max_memory=int(options.max_memory or 0),
        scratch=scratch,
        progress=partial(progress, f"activations of {mlp.module}"),
    ):
        held = pairs.rows(torch.arange(train, len(pairs)))
        for when, net in nets.items():
            error = measure(net, *held, device).rel_error
            what = f"undoing {mlp.module}, as it was {when} the end-to-end phase"
            done.append(attacked(net, report, pairs, error, text, options, partial(progress, what)))
    before, after = done
    return before, after


def _unlocked(before: dict[str, float], after: dict[str, float]) -> str | None:
    """The module that the phase unlocked, by the flatten gaps of all; None where it unlocked none."""
    for name, gap in before.items():
        if gap >= LOCKED_GAP and not after[name] >= LOCKED_GAP:
            return f"unlocked {name}: its flatten gap was {gap:.3f}, then {after[name]:.3f}"
    return None


def _weaker(together: Together) -> str | None:
    """What the phase made worse; None where it is to be kept."""
    t = together
    distances = distance_of(t.evaluation_before), distance_of(t.evaluation_after)
    if distances[1] > distances[0]:
        return f"led away from the original: distance {distances[0]:.4f}, then {distances[1]:.4f}"
    if not t.smallest_gap_after >= _KEPT_GAP * t.smallest_gap_before:
        return (
            f"lowered the smallest flatten gap: {t.smallest_gap_before:.3f}, then {t.smallest_gap_after:.3f}"
        )
    if t.unlocking_before and t.unlocking_after:
        before, after = t.unlocking_before.copy_error, t.unlocking_after.copy_error
        undone = t.unlocking_after.undone and not t.unlocking_before.undone
        if undone or after < _KEPT_ERROR * before:
            return f"made {t.weakest} easier to undo: a copy's error was {before:.4f}, then {after:.4f}"
    return None
