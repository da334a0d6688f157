"""A conversion from end to end: source, text, activations, distillation, checkpoint, figures."""

import shutil
import time
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..runtime import DLRError, DLRNet, load, lock
from ..runtime.checkpoint import write_manifest
from ..runtime.dtypes import DTYPES, dtype_name
from ..runtime.files import check_space, check_target, whole_directory
from ..runtime.generation import positions
from .card import model_card
from .evaluate import compare
from .kept import Kept, claimed
from .mlps import MLP, find_mlps, select_layers
from .modules import Progress, lock_modules, spec_of
from .options import Options
from .report import ConversionReport
from .source import Source, compute_dtype, open_source
from .text import CalibrationText, digest, load_text, poor_text
from .together import finish_together

SEQUENCE_LENGTH = 512


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
    called with (what, done, total) as the work goes on. `out` appears whole, at the end. Finished modules are kept
    in `<out>.partial` until then: the same call goes on from there after a failure or Ctrl-C. Raises DLRError on
    everything that the user can correct.
    """
    started = time.monotonic()
    chosen = Options(**options).resolved()
    target = Path(out).expanduser().absolute()
    given = Path(source).expanduser().resolve()
    if given.exists() and (given.is_relative_to(target.resolve()) or target.resolve().is_relative_to(given)):
        raise DLRError(f"the source {source} and the output {out} lie in one another; choose another output")
    check_target(target, overwrite=overwrite)
    report_progress = progress or (lambda what, done, total: None)
    with claimed(target):
        # It checks the target again, now that nobody else writes.
        with whole_directory(target, overwrite=overwrite) as work:
            report, kept = _converted(source, out, target, work, chosen, report_progress, started)
        kept.remove()
    return report


def _converted(
    source: str | Path,
    out: str | Path,
    target: Path,
    work: Path,
    chosen: Options,
    report_progress: Progress,
    started: float,
) -> tuple[ConversionReport, Kept]:
    """Writes the checkpoint into `work`, which will be `target`."""
    device = torch.device(str(chosen.device))
    scratch = work / "scratch"
    scratch.mkdir()
    report_progress("reading the model", 0, 1)
    original = open_source(source, dtype=compute_dtype(device), device=device)
    model = original.model
    if getattr(model.config, "is_encoder_decoder", False):
        raise DLRError(f"{original.name} is an encoder-decoder model, which is not supported")
    every = find_mlps(model, chosen.mlps)
    mlps = select_layers(every, chosen.layers)
    for mlp in mlps:
        spec_of(mlp, chosen)  # raises, before any long work, where there is no such chain
    stored = DTYPES.get(chosen.dtype) or original.dtype
    parameters = sum(p.numel() for p in model.parameters())
    check_space(target, parameters * stored.itemsize)
    report_progress("reading the model", 1, 1)

    text = calibration_text(original, chosen, report_progress)
    kept = Kept(target, _facts(original, mlps, text, chosen, stored))
    modules = lock_modules(
        model, mlps, text, chosen, stored, kept=kept, scratch=scratch, progress=report_progress
    )
    together = finish_together(model, mlps, modules, text, chosen, scratch, report_progress)

    report_progress("writing the checkpoint", 0, 1)
    locked_parameters = _write(original, modules.chains, mlps, stored, work)
    shutil.rmtree(scratch)
    report_progress("writing the checkpoint", 1, 1)
    report = ConversionReport(
        source=public_name(original.name),
        out=str(out),
        options=chosen.said() | {"dtype": dtype_name(stored), "data": text.source},
        modules=modules.reports,
        mlps=len(every),
        params_original=parameters,
        params_locked=locked_parameters,
        # the checkpoint, read back as its users will
        evaluation=compare(
            load(work, dtype=model.dtype, device=device),
            model,
            text.heldout,
            partial(report_progress, "measuring the locked model"),
        ),
        seconds=time.monotonic() - started,
        across=modules.across,
        together=together,
        warnings=[note for note in (*modules.notes, poor_text(text.train)) if note],
        program={name: version(name) for name in ("dlr-lock", "torch", "transformers")},
    )
    (work / "README.md").write_text(model_card(report), encoding="utf-8")
    facts = report.to_dict() | {"fingerprint": original.fingerprint}
    facts["source"] = report.source
    del facts["out"]
    write_manifest(work, {"conversion": facts})
    return report, kept


def _facts(
    original: Source, mlps: list[MLP], text: CalibrationText, options: Options, stored: torch.dtype
) -> dict[str, Any]:
    """All that the modules of a conversion depend on; a module made with other facts is not reused."""
    free = (
        "device",
        "max_memory",
        "together",
        "data",
        "heldout",
        "layers",
        "dtype",
        "effort",
        "temperature",
        "unlock",
    )
    chosen = {name: value for name, value in options.said().items() if name not in free}
    recipe = {name: value for name, value in asdict(options.recipe()).items() if name not in chosen}
    return chosen | {
        "recipe": recipe,
        "source": original.fingerprint,
        "layers": [mlp.module for mlp in mlps],
        "text": digest(text.train, text.heldout),
        "dtype": dtype_name(stored),
        "program": version("dlr-lock"),
    }


def calibration_text(original: Source, options: Options, progress: Progress) -> CalibrationText:
    """The text that resolved options name, in the model's tokens. Raises DLRError as `load_text` does."""
    assert options.tokens and options.heldout  # resolved
    room = positions(original.model)
    if options.sequence and room and options.sequence > room:
        raise DLRError(f"--sequence {options.sequence}: the model takes at most {room} tokens")
    return load_text(
        options.data,
        original.tokenizer,
        tokens=options.tokens,
        heldout_tokens=options.heldout,
        sequence_length=options.sequence or sequence_length(original.model),
        model=original.model,
        seed=options.seed,
        temperature=options.temperature,
        progress=partial(progress, "calibration text"),
    )


def sequence_length(model: PreTrainedModel) -> int:
    """Tokens a sequence of calibration text: 512, or what the model can take."""
    return min(SEQUENCE_LENGTH, positions(model) or SEQUENCE_LENGTH)


def public_name(source: str) -> str:
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
