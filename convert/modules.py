"""All modules of a conversion, one after the other: each chain, and what became of it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..runtime import DLRError, DLRNet, DLRSpec
from .capture import Activations, capture
from .distill import distill
from .fidelity import measure
from .kept import Kept
from .layers import Unrepeatable
from .mlps import MLP, teacher_weights
from .options import Options
from .report import ModuleReport
from .streams import Streams
from .text import CalibrationText
from .unlock import Unlocking, undo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]  # (what is being done, done, total)
_Module = tuple[DLRNet, ModuleReport]


@dataclass
class Modules:
    """The fitted chains by module name, in the checkpoint's dtype on the CPU; a report each, in model order.

    across: 'sequential' or 'independent', as it was done. notes: what the owner should know, a sentence each.
    """

    chains: dict[str, DLRNet]
    reports: list[ModuleReport]
    across: str
    notes: list[str] = field(default_factory=list)


def lock_modules(
    model: PreTrainedModel,
    mlps: list[MLP],
    text: CalibrationText,
    options: Options,
    stored: torch.dtype,
    *,
    kept: Kept,
    scratch: Path,
    progress: Progress,
) -> Modules:
    """Distils every MLP of `mlps`, in model order. Modules that `kept` has are taken from there.

    Raises DLRError as `distill` and `capture` do, and where options.across is 'sequential' and the model does
    not allow it.
    """
    done = Modules({}, [], options.across or "sequential")
    tokens = torch.cat([text.train, text.heldout])
    passing = partial(progress, "activations")
    streams = None
    if done.across == "sequential":
        try:
            streams = Streams(
                model,
                mlps,
                tokens,
                max_memory=int(options.max_memory or 0),
                scratch=scratch,
                progress=passing,
            )
        except Unrepeatable as error:
            if options.across:
                raise DLRError(f"the model cannot be distilled sequentially: {error}") from error
            done.across = "independent"
            done.notes.append(f"modules were distilled independently: {error}")
    before = {mlp.module: _restored(kept, mlp, stored) for mlp in mlps}
    todo = [mlp for mlp in mlps if not _finished(before[mlp.module], options)]
    independent = capture(
        model,
        todo if streams is None else [],
        tokens,
        max_memory=int(options.max_memory or 0),
        scratch=scratch,
        progress=passing,
    )
    for number, mlp in enumerate(mlps, 1):
        module = before[mlp.module]
        if not _finished(module, options):
            pairs = streams.pairs(mlp) if streams else next(independent)[1]
            title = f"{mlp.module} ({number} of {len(mlps)})"
            if module is None:
                module = _fit(model, mlp, pairs, text, options, stored, title, progress)
                kept.put(mlp.module, module[0].state_dict(), module[1].to_dict())  # before what may fail
            if options.unlock:
                module = _attack(*module, pairs, text, options, title, progress, done.notes)
                kept.put(mlp.module, module[0].state_dict(), module[1].to_dict())
            pairs.close()
        assert module is not None
        net, report = module
        if streams:
            report = replace(report, drift=streams.put(mlp, net))
        done.chains[mlp.module] = net
        done.reports.append(report)
        done.notes.extend(report.notes)
    unknown = [mlp.module for mlp in mlps if mlp.up is None]
    if unknown and options.start == "mixed":
        done.notes.append(
            f"the inside of {', '.join(unknown)} is unknown: a chain in its place started at random, which fits worse"
        )
    if streams and streams.uncorrected:
        done.notes.append(
            f"{len(streams.uncorrected)} of {len(mlps)} modules were fitted to the original's outputs and correct no "
            "errors before them, for a norm follows their MLPs"
        )
    return done


def spec_of(mlp: MLP, options: Options) -> DLRSpec:
    """The chain for an MLP. Raises DLRError where the options make none."""
    return DLRSpec.of_params(
        mlp.hidden_size,
        round(mlp.params * options.params),
        lanes=options.lanes,
        depth=options.depth,
        rank=options.rank,
        act=options.act,
        gated=options.gated,
    )


def _fit(
    model: PreTrainedModel,
    mlp: MLP,
    pairs: Activations,
    text: CalibrationText,
    options: Options,
    stored: torch.dtype,
    title: str,
    progress: Progress,
) -> _Module:
    started = time.monotonic()
    spec, device, train = spec_of(mlp, options), torch.device(str(options.device)), text.train.numel()
    recipe = options.recipe()
    recipe = replace(recipe, seed=recipe.seed + mlp.layer)
    notes: list[str] = []
    tensors = distill(
        pairs,
        train,
        spec,
        recipe,
        name=mlp.module,
        device=device,
        teacher=teacher_weights(model, mlp) if recipe.start == "mixed" else None,
        progress=partial(progress, f"distilling {title}, {spec}"),
        note=notes.append,
    )
    net = DLRNet(spec, dtype=stored)
    net.assign(tensors)
    held = torch.arange(train, len(pairs))
    fidelity = measure(net, *pairs.rows(held), device, pairs.first[held])
    seconds = time.monotonic() - started
    report = ModuleReport(
        mlp.module, mlp.layer, spec, mlp.params, fidelity, recipe.visits, seconds, notes=tuple(notes)
    )
    return net, report


def _attack(
    net: DLRNet,
    report: ModuleReport,
    pairs: Activations,
    text: CalibrationText,
    options: Options,
    title: str,
    progress: Progress,
    notes: list[str],
) -> _Module:
    """The module with the attack's outcome; without one, and a note, where the attack itself failed."""
    try:
        unlocking = attacked(
            net,
            report,
            pairs,
            report.fidelity.rel_error,
            text,
            options,
            partial(progress, f"undoing {title}"),
        )
    except DLRError as error:
        # Not kept with the module: the attack is tried again where an interrupted conversion goes on.
        notes.append(f"the attack on {report.module} failed: {error}")
        return net, report
    return net, replace(report, unlocking=unlocking)


def attacked(
    net: DLRNet,
    report: ModuleReport,
    pairs: Activations,
    chain_error: float,
    text: CalibrationText,
    options: Options,
    progress: Callable[[int, int], None],
) -> Unlocking:
    """The attack on a module's chain for options.unlock of its conversion's visits. pairs, chain_error: as for `undo`.

    Raises DLRError as `undo` does.
    """
    assert options.unlock
    return undo(
        copy.deepcopy(net).float(),
        pairs,
        text.train.numel(),
        chain_error,
        visits=max(1, round(options.unlock * report.tokens)),
        conversion=report.tokens,
        name=report.module,
        device=torch.device(str(options.device)),
        seed=options.seed + report.layer,
        progress=progress,
    )


def _restored(kept: Kept, mlp: MLP, stored: torch.dtype) -> _Module | None:
    """A module that an interrupted conversion finished, None where it did not."""
    found = kept.get(mlp.module)
    if found is None:
        return None
    try:
        report = ModuleReport.from_dict(found[1])
        net = DLRNet(report.spec, dtype=stored)
        net.assign(found[0])
    except (KeyError, TypeError, ValueError) as error:
        raise DLRError(f"what {kept.folder} keeps of {mlp.module} is damaged: delete that folder") from error
    return net, report


def _finished(module: _Module | None, options: Options) -> bool:
    return module is not None and (module[1].unlocking is not None or not options.unlock)
