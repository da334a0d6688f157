"""A conversion from end to end: source, text, activations, distillation, checkpoint, figures."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..runtime import DLRError, DLRNet, DLRSpec, load, lock
from ..runtime.checkpoint import write_manifest
from ..runtime.dtypes import DTYPES, dtype_name
from ..runtime.files import check_space, check_target, whole_directory
from ..runtime.generation import positions
from .capture import capture
from .card import model_card
from .distill import Recipe, distill, measure
from .evaluate import Evaluation, evaluate
from .mlps import MLP, find_mlps, select_layers, teacher_weights
from .options import Options
from .report import ConversionReport, ModuleReport
from .source import Source, compute_dtype, open_source
from .text import CalibrationText, load_text

SEQUENCE_LENGTH = 512

Progress = Callable[[str, int, int], None]  # (what is being done, done, total)


def convert_model(
    source: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> ConversionReport:
    """Locks a model: replaces its MLPs by DLR-Nets fitted to them and writes the checkpoint `out`.

    source: a transformers directory, a hub id or a .gguf file. options: the fields of `Options`. progress is
    called with (what, done, total) as the work goes on. `out` appears whole, at the end; a failure or Ctrl-C
    leaves nothing behind. Raises DLRError on everything that the user can correct.
    """
    started = time.monotonic()
    chosen = Options(**options).resolved()
    recipe = Recipe(visits=chosen.visits, batch=chosen.batch, start=chosen.start, seed=chosen.seed)  # type: ignore[arg-type]
    target = Path(out).expanduser().absolute()
    given = Path(source).expanduser().resolve()
    if given.exists() and (given.is_relative_to(target.resolve()) or target.resolve().is_relative_to(given)):
        raise DLRError(f"the source {source} and the output {out} lie in one another; choose another output")
    check_target(target, overwrite=overwrite)
    report_progress = progress or (lambda what, done, total: None)
    device = torch.device(str(chosen.device))
    with whole_directory(target, overwrite=overwrite) as work:
        scratch = work / "scratch"
        scratch.mkdir()
        report_progress("reading the model", 0, 1)
        original = open_source(source, dtype=compute_dtype(device), device=device)
        model = original.model
        every = find_mlps(model, chosen.mlps)
        mlps = select_layers(every, chosen.layers)
        for mlp in mlps:
            _check(mlp, chosen)
        stored = DTYPES.get(chosen.dtype) or original.dtype
        parameters = sum(p.numel() for p in model.parameters())
        check_space(target, parameters * stored.itemsize)
        report_progress("reading the model", 1, 1)

        text = _text(original, chosen, report_progress)
        chains, modules = _distil_all(model, mlps, text, recipe, chosen, stored, scratch, report_progress)

        report_progress("writing the checkpoint", 0, 1)
        locked_parameters = _write(original, chains, mlps, stored, work)
        shutil.rmtree(scratch)
        report_progress("writing the checkpoint", 1, 1)
        report = ConversionReport(
            source=_public_name(original.name),
            out=str(out),
            options=chosen.said() | {"dtype": dtype_name(stored), "data": text.source},
            modules=modules,
            mlps=len(every),
            params_original=parameters,
            params_locked=locked_parameters,
            evaluation=_evaluate(work, original, text, report_progress),
            seconds=time.monotonic() - started,
            program={name: version(name) for name in ("dlr-lock", "torch", "transformers")},
        )
        (work / "README.md").write_text(model_card(report), encoding="utf-8")
        facts = report.to_dict() | {"fingerprint": original.fingerprint}
        facts["source"] = report.source
        del facts["out"]
        write_manifest(work, {"conversion": facts})
    return report


def _spec(mlp: MLP, options: Options) -> DLRSpec:
    return DLRSpec.of_params(
        mlp.hidden_size,
        mlp.params,
        lanes=options.lanes,
        depth=options.depth,
        rank=options.rank,
        act=options.act,
        gated=options.gated,
    )


def _check(mlp: MLP, options: Options) -> None:
    """Raises DLRError, before any long work, where no such chain can be made for this MLP."""
    _spec(mlp, options)
    if options.start == "aligned" and (mlp.up is None or (options.gated and mlp.gate is None)):
        kind = "a gated MLP" if options.gated else "an MLP of a known form"
        raise DLRError(f"{mlp.module} is not {kind}, which the aligned start needs: use --start random")


def _text(original: Source, options: Options, progress: Progress) -> CalibrationText:
    assert options.tokens and options.heldout  # resolved
    return load_text(
        options.data,
        original.tokenizer,
        tokens=options.tokens,
        heldout_tokens=options.heldout,
        sequence_length=sequence_length(original.model),
        model=original.model,
        seed=options.seed,
        temperature=options.temperature,
        progress=lambda done, total: progress("calibration text", done, total),
    )


def _distil_all(
    model: PreTrainedModel,
    mlps: list[MLP],
    text: CalibrationText,
    recipe: Recipe,
    options: Options,
    stored: torch.dtype,
    scratch: Path,
    progress: Progress,
) -> tuple[dict[str, DLRNet], list[ModuleReport]]:
    """The fitted chains by module name, in the checkpoint's dtype on the CPU, and what became of each."""
    device = torch.device(str(options.device))
    chains, reports = {}, []
    tokens = torch.cat([text.train, text.heldout])
    activations = capture(
        model,
        mlps,
        tokens,
        max_memory=int(options.max_memory or 0),
        scratch=scratch,
        progress=lambda done, total: progress("teacher's activations", done, total),
    )
    for number, (mlp, pairs) in enumerate(activations, 1):
        started = time.monotonic()
        spec = _spec(mlp, options)
        title = f"distilling {mlp.module} ({number} of {len(mlps)}, {spec})"
        tensors = distill(
            pairs,
            text.train.numel(),
            spec,
            replace(recipe, seed=recipe.seed + mlp.layer),
            name=mlp.module,
            device=device,
            teacher=teacher_weights(model, mlp) if recipe.start == "aligned" else None,
            progress=partial(progress, title),
        )
        net = DLRNet(spec, dtype=stored)
        net.assign(tensors)
        held = torch.arange(text.train.numel(), len(pairs))
        fidelity = measure(net, *pairs.rows(held), device)
        chains[mlp.module] = net
        seconds = time.monotonic() - started
        reports.append(
            ModuleReport(mlp.module, mlp.layer, spec, mlp.params, fidelity, recipe.visits, seconds)
        )
    return chains, reports


def sequence_length(model: PreTrainedModel) -> int:
    """Tokens a sequence of calibration text: 512, or what the model can take."""
    return min(SEQUENCE_LENGTH, positions(model) or SEQUENCE_LENGTH)


def _public_name(source: str) -> str:
    """A source's name as it may be published: of a local path only the last part."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def _write(
    original: Source, chains: dict[str, DLRNet], mlps: list[MLP], stored: torch.dtype, work: Path
) -> int:
    """Saves the source, read again in the checkpoint's dtype, with the chains in place; returns its parameters.

    Read again, because casting a loaded model would also cast what must stay in float32 (rotary frequencies).
    """
    model = type(original.model).from_pretrained(original.path, dtype=stored)
    lock(model, chains, [name for mlp in mlps for name in mlp.identity])
    model.save_pretrained(work)
    if original.tokenizer is not None:
        original.tokenizer.save_pretrained(work)
    return sum(p.numel() for p in model.parameters())


def _evaluate(work: Path, original: Source, text: CalibrationText, progress: Progress) -> Evaluation | None:
    """The checkpoint, read back as its users will, against the original on the held-out text."""
    if original.model.get_output_embeddings() is None:
        return None
    locked = load(work, dtype=original.model.dtype, device=original.model.device)
    return evaluate(
        locked,
        text.heldout,
        original=original.model,
        progress=lambda done, total: progress("measuring the locked model", done, total),
    )
