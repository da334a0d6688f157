"""A conversion from end to end: source, text, activations, distillation, checkpoint, figures."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..common.dtypes import DTYPES, dtype_name
from ..common.errors import DLRError
from ..common.files import check_space, check_target, permission_is_an_error, whole_directory
from ..common.progress import Progress, expect, no_progress, say
from ..common.resume import ResumeStore, run_lock
from ..common.scalars import Scalars, scalar_log
from ..common.side_files import carry_over, licence
from ..common.version import __version__
from ..runtime import DLRExperts, DLRNet, ExpertsSpec
from ..runtime.checkpoint import write_manifest
from .activations import Activations, SequentialCalibrator
from .config import ConversionConfig, Recipe
from .context import Context
from .data import calibration_text, digest, poor_text
from .distill import Weights, distill
from .end_to_end import run_end_to_end
from .experts.fit import fit_mixture
from .experts.routing import Mixture
from .layer_runner import Unrepeatable
from .mlp_discovery import check_dense, find_mlps, select_layers, unknown_mixtures
from .mlp_matching import MLP, teacher_weights
from .outlook.amounts import reckoned
from .outlook.checks import check_choices
from .outlook.phases import to_come
from .redistill import attack_module, attack_tokens
from .report import ConversionReport, ModuleReport, Modules, model_card
from .source import compute_dtype, open_source, public_name, unplaced_tensors, weight_files
from .writing import KeptChains, measure_checkpoint, restored, write_checkpoint, write_words

_Module = tuple[DLRNet | DLRExperts, ModuleReport]

# Layer 11 of SmolLM2 writes 600,000 times the usual |y|^2 at first tokens. A chain with an error of 0.19 there is a
# sound part of the model; with 0.95, and 0.23 over all tokens, the loss went from 2.61 to 3.26.
_FIRST_LOST = 0.5


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
    from there after a failure or Ctrl-C.

    Args:
        source: A transformers directory, a hub id or a .gguf file.
        out: The directory of the checkpoint.
        overwrite: Whether a locked checkpoint that is there already is replaced.
        progress: Called with (what is being done, done, total) as the work goes on.
        log_dir: A folder for figures of the work as it goes on, for TensorBoard; None for none.
        **options: The fields of `ConversionConfig`.

    Returns:
        What was done and measured.

    Raises:
        DLRError: On everything that the user can correct.
    """
    started = time.monotonic()
    config = ConversionConfig.of(options).resolved()
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
        check_target(target, overwrite=overwrite)
        with run_lock(target), scalar_log(log_dir) as scalars:
            # It checks the target again, now that nobody else writes.
            with whole_directory(target, overwrite=overwrite) as work:
                context, mlps = _prepared(source, target, work, config, progress, scalars, started)
                report = _converted(context, mlps, work, str(out))
            context.resume.remove()
    return report


def _prepared(
    source: str | Path,
    target: Path,
    work: Path,
    config: ConversionConfig,
    progress: Progress,
    scalars: Scalars,
    started: float,
) -> tuple[Context, int]:
    """All that the work needs, and how many MLPs the model has; raises DLRError before any long work.

    started: when the run began.

    What is carried over from the source is in `work` afterwards.
    """
    device = torch.device(str(config.device))
    scratch = work / ".scratch"  # hidden files are not carried over: nothing of the source's is called so
    scratch.mkdir()
    with _shown(progress, "reading the model"):
        original = open_source(source, dtype=compute_dtype(device), device=device, room=_room(config, device))
        every = find_mlps(original.model, config.mlps)
        notes = [check_dense(original.model, every, layers=config.layers, pattern=config.mlps)]
        mlps = select_layers(every, config.layers)
        check_choices(
            config, original.model, mlps, size=original.model.num_parameters() * original.model.dtype.itemsize,
            whole=original.weights is None, words=original.tokenizer is not None,
        )  # fmt: skip
        stored = DTYPES.get(config.dtype) or original.dtype
        weights = {file.name for file in weight_files(original.path)}
        notes.append(carry_over(original.path, work, weights))
        replaced = [name for mlp in mlps for name in (mlp.module, *mlp.identity)]
        notes.append(unplaced_tensors(original, replaced)[1])
        write_words(original, work)
        check_space(target, original.model.num_parameters() * stored.itemsize)
    if config.data == "self" and (device.type == "cpu" or original.weights is not None):
        where = "on a CPU" if original.weights is None else "with weights that are read from the disk"
        say(
            progress,
            f"--data self: {(config.tokens or 0) + (config.heldout or 0):,} tokens are sampled from the model first, "
            f"which {where} takes longer than everything else; --data with a text file is faster, and fits better",
        )
    amounts = reckoned(original, mlps, every, config)
    expect(progress, to_come(amounts))
    text = calibration_text(original, config, progress)
    # All that the modules of a conversion depend on; a module made with other facts is not reused.
    free = (
        "device", "max_memory", "end_to_end", "data", "heldout", "layers", "dtype", "effort", "temperature",
        "redistill",
    )  # fmt: skip
    chosen = {name: value for name, value in config.to_dict().items() if name not in free}
    if any(isinstance(mlp, Mixture) for mlp in mlps):
        chosen["redistill"] = config.redistill  # a mixture's attack comes with its fit
    facts = chosen | {
        "recipe": [
            {name: value for name, value in asdict(config.recipe(gated=gated)).items() if name not in chosen}
            for gated in (False, True)
        ],
        "source": original.fingerprint,
        "layers": [mlp.module for mlp in mlps],
        "text": digest(text.train, text.heldout),
        "dtype": dtype_name(stored),
        "program": __version__,
    }
    resume = ResumeStore(target, facts, started)
    said = [note for note in notes if note]
    context = Context(original, mlps, text, config, stored, resume, scratch, progress, said, amounts, scalars)
    return context, len(every) + len(unknown_mixtures(original.model, every))


def _room(config: ConversionConfig, device: torch.device) -> int:
    """Bytes for a model's weights: as much as activations may take, or half of what a GPU has free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return int(config.max_memory or 0)


def _converted(context: Context, mlps: int, work: Path, out: str) -> ConversionReport:
    """Writes the checkpoint into `work`, which will be `out`. mlps: how many the original has."""
    modules = distill_modules(context)
    end_to_end = run_end_to_end(context, modules)
    with _shown(context.progress, "writing the checkpoint"):
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
        warnings=[note for note in (*context.notes, poor_text(context.text.train)) if note],
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
    before = {
        mlp.module: _report_of(restored(context.resume, context.model, mlp.module, context.stored))
        for mlp in mlps
    }
    todo = [mlp for mlp in mlps if not _finished(before[mlp.module], config)]
    _say_what_is_kept(context, before, todo)
    _expect(context, before, todo, sequential=calibrator is not None)
    independent = context.capture(todo if calibrator is None else [])
    for number, mlp in enumerate(mlps, 1):
        module = restored(context.resume, context.model, mlp.module, context.stored)
        if not _finished(_report_of(module), config):
            pairs = calibrator.pairs(mlp) if calibrator else next(independent)[1]
            title = f"{mlp.module} ({number} of {len(mlps)})"
            if module is None:
                fit: Any = fit_mixture if isinstance(mlp, Mixture) else _fit
                module = fit(context, mlp, pairs, title, corrected=bool(calibrator))
                _keep(context, module)  # before what may fail
            if config.redistill and not isinstance(mlp, Mixture):
                module = _attacked(context, module, pairs, title)
                _keep(context, module)
            pairs.close()
        assert module is not None
        net, report = module
        if calibrator:
            report = replace(report, drift=calibrator.put(mlp, net))
        chains.add(mlp.module)
        done.reports.append(report)
        _log(context, mlp, report)
        context.notes.extend(report.notes)
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


def _expect(
    context: Context, before: dict[str, ModuleReport | None], todo: list[MLP], *, sequential: bool
) -> None:
    """Says what there is to do."""
    amounts = context.amounts or reckoned(context.source, context.mlps, context.mlps, context.config)
    if not sequential:
        amounts = replace(amounts, config=replace(amounts.config, across="independent"))
    fits = {name for name, report in before.items() if report is None}
    expect(context.progress, to_come(amounts, fits, {mlp.module for mlp in todo}))


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


def _keep(context: Context, module: _Module) -> None:
    net, report = module
    context.resume.put(report.module, net.state_dict(), report.to_dict())


def _report_of(module: _Module | None) -> ModuleReport | None:
    return None if module is None else module[1]


def _finished(report: ModuleReport | None, config: ConversionConfig) -> bool:
    if report is None or not config.redistill or isinstance(report.spec, ExpertsSpec):
        return report is not None  # a mixture's attack comes with its fit
    found = report.redistillation  # one of another share is not the attack that is asked for
    return found is not None and found.train_tokens == attack_tokens(config.redistill, report.train_tokens)


@contextmanager
def _shown(progress: Progress, what: str) -> Iterator[None]:
    """Work whose progress is only that it is done."""
    progress(what, 0, 1)
    yield
    progress(what, 1, 1)
