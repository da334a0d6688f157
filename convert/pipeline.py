"""A conversion from end to end: source, text, activations, distillation, checkpoint, figures."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..common.dtypes import dtype_name
from ..common.errors import DLRError
from ..common.files import permission_is_an_error
from ..common.options import flag
from ..common.progress import Progress, expect, no_progress, say, shown
from ..common.scalars import scalar_log
from ..common.side_files import licence
from ..common.version import __version__
from ..runtime import DLRExperts, DLRNet, ExpertsSpec
from ..runtime.checkpoint import write_manifest
from .activations.calibrator import SequentialCalibrator
from .activations.pairs import Activations
from .config import ConversionConfig, Recipe
from .context import Context
from .data import poor_text
from .distill import Weights, distill
from .end_to_end import run_end_to_end
from .experts.fit import fit_mixture
from .experts.routing import Mixture
from .layer_runner import Unrepeatable
from .mlp_matching import MLP, teacher_weights
from .outlook.amounts import Amounts, reckoned
from .outlook.phases import dealt_modules, exchange_words, sent_by_each, to_come
from .parallel.output import shared_output
from .parallel.ranks import joined
from .redistill import attack_module, attack_tokens
from .report import ConversionReport, EndToEndReport, ModuleReport, Modules, model_card
from .source import public_name
from .sources.preparation import prepared
from .writing import KeptChains, measure_checkpoint, restored, write_checkpoint

_Module = tuple[DLRNet | DLRExperts, ModuleReport]

# Layer 11 of SmolLM2 writes 600,000 times the usual |y|^2 at first tokens. A chain with an error of 0.19 there is a
# sound part of the model; with 0.95, and 0.23 over all tokens, the loss went from 2.61 to 3.26.
_FIRST_LOST = 0.5
_MUCH_SENT = 1e12  # bytes from each process: ten seconds at 100 GB/s


def convert_model(
    source: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
    log_dir: str | Path | None = None,
    **options: Any,
) -> ConversionReport:
    """Locks a model: replaces its MLPs by DLR-Nets fitted to them and writes the checkpoint `out`.

    `out` appears whole, at the end. Finished modules are kept in `<out>.partial` until then: the same call goes on
    from there after a failure or Ctrl-C. Of several processes that a launcher started (see `parallel`), all must call
    this, with the same arguments; the first one writes.

    Args:
        source: A transformers directory, a hub id or a .gguf file.
        out: The directory of the checkpoint.
        overwrite: Whether a locked checkpoint that is there already is replaced.
        progress: Called with (what is being done, done, total) as the work goes on, in the first process.
        log_dir: A folder for figures of the work as it goes on, for TensorBoard, in the first process; None for none.
        **options: The fields of `ConversionConfig`.

    Returns:
        What was done and measured, in every process.

    Raises:
        DLRError: On everything that the user can correct.
    """
    started = time.monotonic()
    ranks = joined()
    config = ConversionConfig.of(options).resolved()
    ranks.take_device(torch.device(str(config.device)))
    target = Path(out).expanduser().absolute()
    given = Path(source).expanduser().resolve()
    with permission_is_an_error():
        if given.exists() and (
            given.is_relative_to(target.resolve()) or target.resolve().is_relative_to(given)
        ):
            raise DLRError(
                f"the source {source} and the output {out} lie in one another; choose another output"
            )
        if log_dir is not None and Path(log_dir).expanduser().resolve().is_relative_to(target.resolve()):
            raise DLRError(
                f"--log-dir {log_dir} is in the output {out}, which a conversion replaces: choose another"
            )
        with (
            shared_output(ranks, target, overwrite=overwrite) as (work, kept),
            scalar_log(log_dir if ranks.first else None) as scalars,
        ):
            told = progress if ranks.first else no_progress
            context, mlps = prepared(source, target, work, config, told, scalars, started, ranks)
            kept.append(context.resume)
            report = _converted(context, mlps, work, str(out))
    return report


def _converted(context: Context, mlps: int, work: Path, out: str) -> ConversionReport:
    """Writes the checkpoint into `work`, which will be `out`. mlps: how many the original has."""
    modules = distill_modules(context)
    end_to_end = run_end_to_end(context, modules)
    for notes in context.ranks.gathered(context.device_notes)[1:]:  # the first process's are to come
        context.notes += [note for note in notes if note not in context.notes]
    return context.ranks.agreed(lambda: _written(context, modules, end_to_end, mlps, work, out))


def _written(
    context: Context,
    modules: Modules,
    end_to_end: EndToEndReport | None,
    mlps: int,
    work: Path,
    out: str,
) -> ConversionReport:
    with shown(context.progress, "writing the checkpoint"):
        locked_parameters = write_checkpoint(context, modules.chains, work)
        shutil.rmtree(context.scratch)
    original, model = context.source, context.model
    evaluation = measure_checkpoint(context, work, modules.runner)
    context.log_model(evaluation, end_to_end.train_tokens if end_to_end else 0)
    report = ConversionReport(
        source=public_name(original.name),
        out=out,
        options=context.config.to_dict() | {"dtype": dtype_name(context.stored), "data": context.text.source},
        modules=modules.reports,
        mlps=mlps,
        params_original=model.num_parameters(),
        params_locked=locked_parameters,
        evaluation=evaluation,
        seconds=context.resume.seconds,
        across=modules.across,
        end_to_end=end_to_end,
        foretold=context.foretold,
        warnings=[
            note for note in (*context.notes, *context.device_notes, poor_text(context.text.train)) if note
        ],
        licence=licence(original.path),
        program={"dlr-lock": __version__} | {name: version(name) for name in ("torch", "transformers")},
    )
    (work / "README.md").write_text(model_card(report), encoding="utf-8")
    facts = report.to_dict() | {"fingerprint": original.fingerprint}
    del facts["out"]
    write_manifest(work, {"conversion": facts})
    return report


def distill_modules(context: Context) -> Modules:
    """Distils every MLP of a conversion, in model order; finished modules are taken from the resume store.

    Raises:
        DLRError: As `distill` and `capture` do, and where the modules are to correct one another and the model does
            not allow it.
    """
    config, mlps = context.config, context.mlps
    chains = KeptChains(context.resume, context.model, context.stored)
    done = Modules(chains, [], config.across or "sequential")
    calibrator: SequentialCalibrator | None = None
    if done.across == "sequential":
        try:
            calibrator = context.calibrator()
        except Unrepeatable as error:
            if config.across:
                raise DLRError(f"the model cannot be distilled sequentially: {error}") from error
            done.across = "independent"
            context.notes.append(f"modules were distilled independently: {error}")
    done.runner = calibrator.runner if calibrator else None
    before = context.ranks.agreed(
        lambda: {mlp.module: _report_of(_restored(context, mlp.module)) for mlp in mlps}
    )
    context.resume.await_parts(name for name, report in before.items() if report is not None)
    todo = [mlp for mlp in mlps if not _finished(before[mlp.module], config)]
    _say_what_is_kept(context, before, todo)
    if calibrator is None:
        _fit_apart(context, before, todo)
    else:
        _expect(context, _amounts(context, done.across), before, todo)
    for mlp in mlps:
        module: _Module | None
        if calibrator and not _finished(before[mlp.module], config):
            pairs = calibrator.pairs(mlp)
            module = _finish(context, mlp, pairs, fitted=before[mlp.module] is not None, corrected=True)
            pairs.close()
        else:
            module = _restored(context, mlp.module)
        assert module is not None
        net, report = module
        if calibrator:
            report = replace(report, drift=calibrator.put(mlp, net))
        chains.add(mlp.module)
        done.reports.append(report)
        _log(context, mlp, report)
        context.notes.extend(report.notes)
    context.resume.await_parts(chains)
    unknown = [mlp.module for mlp in mlps if mlp.up is None and not isinstance(mlp, Mixture)]
    if unknown and config.init == "mixed":
        context.notes.append(
            f"the inside of {', '.join(unknown)} is unknown: a chain in its place started at random, which fits worse"
        )
    if calibrator and calibrator.uncorrected:
        context.notes.append(
            f"{len(calibrator.uncorrected)} of {len(mlps)} modules were fitted to the original's outputs and correct "
            "no errors before them, for what follows them in their layer is no plain sum: a norm, a gate"
        )
    return done


def _fit_apart(context: Context, before: dict[str, ModuleReport | None], todo: list[MLP]) -> None:
    """Fits the modules that are to be done, independently, each in one of the processes."""
    ranks, amounts = context.ranks, _amounts(context, "independent")
    _expect(context, amounts, before, todo)
    begin = len(context.notes)
    # By one process: FLOPs are counted for its own threads, and others may have more.
    hands = ranks.agreed(lambda: dealt_modules(amounts, todo, ranks.size))
    for mlp, pairs in context.capture_dealt(hands):
        _finish(context, mlp, pairs, fitted=before[mlp.module] is not None, corrected=False)
    if ranks.size > 1:
        context.progress("waiting for the other processes", 0, 1)
    context.notes[begin:] = [note for notes in ranks.gathered(context.notes[begin:]) for note in notes]
    context.resume.await_parts(mlp.module for mlp in todo)


def _finish(context: Context, mlp: MLP, pairs: Activations, *, fitted: bool, corrected: bool) -> _Module:
    """An MLP's chain and the attack on it, as far as they are to do, kept as soon as they are done.

    fitted: Whether the chain is kept already. corrected: Whether modules correct one another; all processes have a part
    in each then, and the first one keeps it.
    """
    module = _restored(context, mlp.module) if fitted else None
    title = f"{mlp.module} ({context.mlps.index(mlp) + 1} of {len(context.mlps)})"

    def keep(module: _Module) -> None:
        net, report = module
        if context.ranks.first or not corrected:
            context.resume.put(report.module, net.state_dict(), report.to_dict())

    if module is None:
        fit: Any = fit_mixture if isinstance(mlp, Mixture) else _fit
        module = fit(context, mlp, pairs, title, corrected=corrected)
        keep(module)  # before what may fail
    if context.config.redistill and not isinstance(mlp, Mixture):
        module = _attacked(context, module, pairs, title)
        keep(module)
    return module


def _restored(context: Context, name: str) -> _Module | None:
    return restored(context.resume, context.model, name, context.stored)


def _expect(
    context: Context, amounts: Amounts, before: dict[str, ModuleReport | None], todo: list[MLP]
) -> None:
    """Says what there is to do. todo: for all processes."""
    if amounts.sequential and context.ranks.size > 1 and (sent := sent_by_each(amounts)) > _MUCH_SENT:
        say(
            context.progress,
            f"in sequence these processes exchange {exchange_words(sent)}; {flag('across')} independent exchanges "
            "nothing while modules are fitted",
        )
    fits = {mlp.module for mlp in todo if before[mlp.module] is None}
    expect(context.progress, to_come(amounts, fits, {mlp.module for mlp in todo}))


def _amounts(context: Context, across: str) -> Amounts:
    """What the work was reckoned to be, done by these processes in one way or the other."""
    amounts = context.amounts or reckoned(context.source, context.mlps, context.mlps, context.config)
    config = replace(amounts.config, across=across)
    return replace(amounts, config=config, processes=context.ranks.size)


def _say_what_is_kept(context: Context, before: dict[str, ModuleReport | None], todo: list[MLP]) -> None:
    """Of an interrupted run: what was found, and what is not done again."""
    kept = [name for name, report in before.items() if report is not None]
    if not kept:
        return
    again = [mlp.module for mlp in todo]
    goes_on = f"going on with {again[0]}" if again else "all of them"
    attacks = [name for name in again if before[name] is not None]
    without = f" ({len(attacks)} of them without this attack, which is still to do)" if attacks else ""
    say(
        context.progress,
        f"{context.resume.folder} keeps {len(kept)} of {len(before)} modules of an interrupted run{without}: they are "
        f"not distilled again; {goes_on}",
    )


def _fit(context: Context, mlp: MLP, pairs: Activations, title: str, corrected: bool) -> _Module:
    started = time.monotonic()
    recipe = context.config.recipe(gated=mlp.gated)
    recipe = replace(recipe, seed=recipe.seed + mlp.layer)
    notes: list[str] = []
    net = fit_chain(context, mlp, pairs, recipe, f"distilling {title}", note=notes.append)
    fidelity = context.fidelity(net, pairs)
    if (fidelity.first_error or 0.0) > _FIRST_LOST:
        notes.append(
            f"{mlp.module} misses the first tokens of sequences (relative error {fidelity.first_error:.2f}), on which "
            "some models depend for everything: train it longer, on more text, or leave the layer as it is"
        )
    seconds = time.monotonic() - started
    report = ModuleReport(
        mlp.module,
        mlp.layer,
        net.spec,
        mlp.params,
        fidelity,
        recipe.train_tokens,
        seconds,
        notes=tuple(notes),
    )
    return net, report


def fit_chain(
    context: Context,
    mlp: MLP,
    pairs: Activations,
    recipe: Recipe,
    title: str,
    *,
    watch: Callable[[int, Weights], None] | None = None,
    note: Callable[[str], object] = lambda sentence: None,
) -> DLRNet:
    """One MLP's chain, of the size that the configuration gives it.

    Args:
        context: The conversion.
        mlp: The MLP.
        pairs: What the chain should make of what.
        recipe: How it is distilled.
        title: What the progress calls it; the chain's shape is put behind.
        watch, note: As for `distill`.

    Returns:
        The chain, in the checkpoint's dtype on the CPU.

    Raises:
        DLRError: As `distill` does.
    """
    spec = context.config.spec_for(mlp.hidden_size, mlp.params)
    tensors = distill(
        pairs,
        context.train_rows,
        spec,
        recipe,
        name=mlp.module,
        device=context.device,
        teacher=teacher_weights(context.model, mlp) if recipe.init == "mixed" else None,
        progress=context.count(f"{title}, {spec}"),
        watch=watch,
        log=context.log_of(mlp),
        note=note,
        micro=context.micro_batch("the distillation of modules", "token"),
    )
    net = DLRNet(spec, dtype=context.stored)
    net.assign(tensors)
    return net


def _attacked(context: Context, module: _Module, pairs: Activations, title: str) -> _Module:
    """The module with the attack's outcome; without one, and a note, where the attack itself failed."""
    net, report = module
    assert isinstance(net, DLRNet)
    try:
        found = attack_module(context, net, report, pairs, context.count(f"redistilling {title}"))
    except DLRError as error:
        # Not kept with the module: the attack is tried again where an interrupted conversion goes on.
        context.notes.append(f"the attack on {report.module} failed: {error}")
        return module
    return net, replace(report, redistillation=found)


def _log(context: Context, mlp: MLP, report: ModuleReport) -> None:
    """What was measured of a module: beside its training, and as a point of a curve over the layers."""
    fidelity, attack = report.fidelity, report.redistillation
    found = {
        "error": fidelity.rel_error, "flatten_gap": fidelity.flatten_gap, "coupling": fidelity.coupling,
        "hidden_states": report.drift, "student_over_chain": attack.ratio if attack else None,
    }  # fmt: skip
    context.log_of(mlp)(report.train_tokens, found)
    for name, value in found.items():
        if value is not None:
            context.scalars(f"layers/{name}", value, mlp.layer)


def _report_of(module: _Module | None) -> ModuleReport | None:
    return None if module is None else module[1]


def _finished(report: ModuleReport | None, config: ConversionConfig) -> bool:
    if report is None or not config.redistill or isinstance(report.spec, ExpertsSpec):
        return report is not None  # a mixture's attack comes with its fit
    found = report.redistillation  # one of another share is not the attack that is asked for
    if found is None or found.merged_error is None:  # of a version that did not try the start as it is
        return False
    return found.train_tokens == attack_tokens(config.redistill, report.train_tokens)
