"""What a conversion needs, read and checked before any long work."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...common.dtypes import DTYPES, dtype_name
from ...common.errors import DLRError
from ...common.files import check_space
from ...common.progress import Progress, expect, say, shown
from ...common.resume import ResumeStore
from ...common.scalars import Scalars
from ...common.side_files import carry_over
from ...common.version import __version__
from ..config import ConversionConfig
from ..context import Context
from ..data import CalibrationText, calibration_text, digest
from ..experts.routing import Mixture
from ..mlp_discovery import automatic, check_dense, find_mlps, stand_ins, unknown_mixtures
from ..mlp_matching import MLP
from ..outlook.amounts import reckoned
from ..outlook.checks import check_choices, check_sequences
from ..outlook.foretelling import foretell
from ..outlook.phases import to_come
from ..parallel.ranks import Ranks
from ..source import Source, compute_dtype, open_source, unplaced_tensors, weight_files
from ..writing import write_words


def prepared(
    source: str | Path,
    target: Path,
    work: Path,
    config: ConversionConfig,
    progress: Progress,
    scalars: Scalars,
    started: float,
    ranks: Ranks,
) -> tuple[Context, int]:
    """All that the work needs, and how many MLPs the model has; raises DLRError before any long work.

    started: when the run began.

    What is carried over from the source is in `work` afterwards.
    """
    device = torch.device(str(config.device))
    scratch = work / ".scratch"  # hidden files are not carried over: nothing of the source's is called so
    scratch.mkdir(exist_ok=True)
    with shown(progress, "reading the model"):
        room = _room(config, device) // (1 if device.type == "cuda" else ranks.local_size)
        read: Any = partial(open_source, source, dtype=compute_dtype(device), device=device, room=room)
        # What is fetched or unpacked first is so once.
        original = read() if Path(source).expanduser().is_dir() else ranks.in_turn(read)
        every = find_mlps(original.model, config.mlps)
        notes = [check_dense(original.model, every, layers=config.layers, pattern=config.mlps)]
        mlps = stand_ins(every, config.layers)
        check_choices(
            config, original.model, mlps, every, size=original.model.num_parameters() * original.model.dtype.itemsize,
            whole=original.weights is None, words=original.tokenizer is not None,
        )  # fmt: skip
        stored = DTYPES.get(config.dtype) or original.dtype
        weights = {file.name for file in weight_files(original.path)}
        notes.append(ranks.agreed(lambda: carry_over(original.path, work, weights)))
        ranks.agreed(lambda: write_words(original, work))
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
    text = ranks.agreed(lambda: calibration_text(original, config, progress))
    check_sequences(len(text.train), ranks.size)
    facts = facts_of(original, mlps, text, config, stored)
    if len({json.dumps(other, sort_keys=True, default=str) for other in ranks.gathered(facts)}) > 1:
        raise DLRError(
            "the processes of this run do not convert the same model by the same choices: give all of them the same "
            "source, options and version of this program"
        )
    resume = ranks.in_turn(lambda: ResumeStore(target, facts, started))
    said = [note for note in notes if note]
    context = Context(
        original, mlps, text, config, stored, resume, scratch, progress, said, amounts, scalars, ranks
    )
    foretell(context, every)
    replaced = [name for mlp in context.mlps for name in (mlp.module, *mlp.identity)]
    if note := unplaced_tensors(original, replaced)[1]:
        context.notes.append(note)
    return context, len(every) + len(unknown_mixtures(original.model, every))


def facts_of(
    original: Source, mlps: list[MLP], text: CalibrationText, config: ConversionConfig, stored: torch.dtype
) -> dict[str, Any]:
    """All that the modules of a conversion depend on; a module made with other facts is not reused."""
    free = (
        "device", "max_memory", "end_to_end", "data", "heldout", "layers", "dtype", "effort", "temperature",
        "redistill",
    )  # fmt: skip
    chosen = {name: value for name, value in config.to_dict().items() if name not in free}
    if any(isinstance(mlp, Mixture) for mlp in mlps):
        chosen["redistill"] = config.redistill  # a mixture's attack comes with its fit
    return chosen | {
        "recipe": [
            {name: value for name, value in asdict(config.recipe(gated=gated)).items() if name not in chosen}
            for gated in (False, True)
        ],
        "source": original.fingerprint,
        "layers": config.layers if automatic(config.layers) else [mlp.module for mlp in mlps],
        "text": digest(text.train, text.heldout),
        "dtype": dtype_name(stored),
        "program": __version__,
    }


def _room(config: ConversionConfig, device: torch.device) -> int:
    """Bytes for a model's weights: as much as activations may take, or half of what a GPU has free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return int(config.max_memory or 0)
