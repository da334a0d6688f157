"""All modules of a conversion, one after the other: each chain, and what became of it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
from .recipe import Recipe
from .report import ModuleReport
from .streams import Streams
from .text import CalibrationText
from .unlock import undo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]  # (what is being done, done, total)


@dataclass
class Modules:
    """The fitted chains by module name, in the checkpoint's dtype on the CPU; a report each, in model order.

    across: 'sequential' or 'independent', as it was done; note: why not sequentially, where that was wished.
    """

    chains: dict[str, DLRNet]
    reports: list[ModuleReport]
    across: str
    note: str | None = None


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
            done.across, done.note = "independent", f"modules were distilled independently: {error}"
    missing = [mlp for mlp in mlps if kept.get(mlp.module) is None]
    independent = capture(
        model,
        missing if streams is None else [],
        tokens,
        max_memory=int(options.max_memory or 0),
        scratch=scratch,
        progress=passing,
    )
    for number, mlp in enumerate(mlps, 1):
        before = kept.get(mlp.module)
        if before is not None:
            net, report = _restored(before, stored)
            drift = streams.put(mlp, net) if streams else None
        else:
            pairs = streams.pairs(mlp) if streams else _next(independent)
            title = f"{mlp.module} ({number} of {len(mlps)})"
            net, report = _one(model, mlp, pairs, text, options, stored, title, progress)
            pairs.close()
            drift = streams.put(mlp, net) if streams else None
            report = replace(report, drift=drift)
            kept.put(mlp.module, net.state_dict(), report.to_dict())
        done.chains[mlp.module] = net
        done.reports.append(report)
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


def _one(
    model: PreTrainedModel,
    mlp: MLP,
    pairs: Activations,
    text: CalibrationText,
    options: Options,
    stored: torch.dtype,
    title: str,
    progress: Progress,
) -> tuple[DLRNet, ModuleReport]:
    started = time.monotonic()
    spec, device, train = spec_of(mlp, options), torch.device(str(options.device)), text.train.numel()
    assert options.visits and options.batch and options.unlock is not None  # resolved
    recipe = Recipe(options.visits, options.batch, options.start, options.seed + mlp.layer)
    tensors = distill(
        pairs,
        train,
        spec,
        recipe,
        name=mlp.module,
        device=device,
        teacher=teacher_weights(model, mlp) if recipe.start == "aligned" else None,
        progress=partial(progress, f"distilling {title}, {spec}"),
    )
    net = DLRNet(spec, dtype=stored)
    net.assign(tensors)
    held = torch.arange(train, len(pairs))
    fidelity = measure(net, *pairs.rows(held), device, pairs.first[held])
    seconds = time.monotonic() - started
    report = ModuleReport(mlp.module, mlp.layer, spec, mlp.params, fidelity, recipe.visits, seconds)
    if options.unlock:
        unlocking = undo(
            copy.deepcopy(net).float(),
            pairs,
            train,
            fidelity.rel_error,
            visits=max(1, round(options.unlock * recipe.visits)),
            conversion=recipe.visits,
            name=mlp.module,
            device=device,
            seed=recipe.seed,
            progress=partial(progress, f"undoing {title}"),
        )
        report = replace(report, unlocking=unlocking)
    return net, report


def _restored(
    before: tuple[dict[str, torch.Tensor], dict], stored: torch.dtype
) -> tuple[DLRNet, ModuleReport]:
    tensors, figures = before
    report = ModuleReport.from_dict(figures)
    net = DLRNet(report.spec, dtype=stored)
    net.assign(tensors)
    return net, report


def _next(captured: Iterator[tuple[MLP, Activations]]) -> Activations:
    return next(captured)[1]
