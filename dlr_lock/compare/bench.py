"""How fast a locked model and its original generate: both in one run, in turns, by the same engine."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.errors import typed_line
from ..common.machine import machine
from ..common.progress import Progress, no_progress
from ..convert.use import check_models
from ..runtime.serving import checked_folder, installed_engine
from .config import SpeedConfig
from .timed import TimedModel, opened_in_transformers

SIDES = ("locked", "original")


@dataclass(slots=True)
class SpeedRow:
    """One model at one batch. Figures are [p20, median, p80] over the runs; None: not measured, or not there.

    Attributes:
        model: What was locked, by its name.
        engine: transformers or vllm.
        dtype: Of the weights.
        prompt, new_tokens: Of each sequence, in tokens.
        batch: Sequences at a time.
        side: locked or original.
        first_token_s: Seconds until the first token of all sequences is there.
        prefill_tokens_per_s: Tokens of prompts over that time.
        decode_tokens_per_s: Tokens behind the first, of all sequences, over the time that they took.
        weights_bytes: Of the model's parameters.
        peak_bytes: Of transformers these, and by how much memory grew in a run at most; of vLLM all of its process.
            Memory is on a GPU what torch allocated, on Linux what is resident.
        decode_ratio, prefill_ratio: Of the median to the original's.
        error_message: Why there is nothing.
    """

    model: str
    engine: str
    dtype: str
    prompt: int
    new_tokens: int
    batch: int
    side: str
    first_token_s: list | None = None
    prefill_tokens_per_s: list | None = None
    decode_tokens_per_s: list | None = None
    weights_bytes: int | None = None
    peak_bytes: int | None = None
    decode_ratio: float | None = None
    prefill_ratio: float | None = None
    error_message: str | None = None


def bench_model(
    checkpoint: str | Path, original: str | Path, *, progress: Progress = no_progress, **choices: Any
) -> dict[str, Any]:
    """Times a locked model against its original.

    Args:
        checkpoint: The locked model, a directory or a name on the hub.
        original: The model that was locked; for transformers also a .gguf file.
        progress: Called with (what is being done, done, total).
        choices: As `SpeedConfig` has them.

    Returns:
        A JSON object: the machine, the settings, a `SpeedRow` for each batch and model, and every run in its order.

    Raises:
        DLRError: On choices that make no sense, an engine that is not installed and a checkpoint that is not what was
            written, before a model is loaded; on models that cannot be loaded, cannot generate, or do not take
            sequences so long; where vLLM dies.
    """
    config = SpeedConfig.of(choices).resolved()
    if config.engine == "vllm":
        installed_engine("vllm")
    check_models(original)
    folder = checked_folder(checkpoint)
    with opened_pair(folder, original, config, progress) as models:
        rows, runs = timed_in_turns(models, folder.resolve().name, config, progress)
        threads, versions = models["locked"].threads, models["locked"].versions
    facts = machine(torch.device(str(config.device)))
    return {
        "schema": 1,
        **facts,
        "cpu_threads": threads,
        "versions": facts["versions"] | versions,
        "stopped": None,
        "settings": {
            "engine": config.engine, "prompt": config.prompt, "new_tokens": config.new_tokens,
            "batches": config.sizes, "repeats": config.repeats, "dtype": rows[0].dtype, "eager": config.eager,
        },
        "rows": [asdict(row) for row in rows],
        "runs": runs,
    }  # fmt: skip


@contextmanager
def opened_pair(
    checkpoint: str | Path, original: str | Path, config: SpeedConfig, progress: Progress = no_progress
) -> Iterator[dict[str, TimedModel]]:
    """Both sides' models, loaded by the config's engine, while open. Raises DLRError where one cannot be."""
    opener: Callable[..., AbstractContextManager[TimedModel]] = opened_in_transformers
    if config.engine == "vllm":
        from .vllm_model import opened_in_vllm

        opener = opened_in_vllm
    with ExitStack() as stack:
        models: dict[str, TimedModel] = {}
        for side, source in zip(SIDES, (checkpoint, original), strict=True):
            progress("loading both models", len(models), len(SIDES))
            models[side] = stack.enter_context(opener(side, source, config))
        progress("loading both models", len(SIDES), len(SIDES))
        yield models


def timed_in_turns(
    models: Mapping[str, TimedModel], name: str, config: SpeedConfig, progress: Progress = no_progress
) -> tuple[list[SpeedRow], list[dict[str, Any]]]:
    """Runs every batch by both models in turn, after one run each that does not count.

    Args:
        models: By side, the original last.
        name: For the rows.
        config: Choices, resolved.
        progress: Called with (what is being done, done, total).

    Returns:
        A row for each batch and model, and every run in its order.

    Raises:
        DLRError: An engine died.
    """
    assert config.prompt is not None and config.new_tokens is not None and config.repeats is not None
    prompt, new_tokens = config.prompt, config.new_tokens
    rows: list[SpeedRow] = []
    runs: list[dict[str, Any]] = []
    total = len(config.sizes) * (config.repeats + 1) * len(models)
    for batch in config.sizes:
        pair = [
            SpeedRow(
                name, config.engine, model.dtype, prompt, new_tokens, batch, side,
                weights_bytes=model.weights_bytes,
            )
            for side, model in models.items()
        ]  # fmt: skip
        rows += pair
        for turn in range(config.repeats + 1):
            for row in pair if turn % 2 == 0 else pair[::-1]:
                progress("timing both models", len(runs), total)
                run: dict[str, Any] = {
                    "engine": row.engine, "dtype": row.dtype, "batch": batch, "side": row.side, "counts": turn > 0
                }  # fmt: skip
                runs.append(run)
                if row.error_message is None:
                    try:
                        run |= models[row.side].run(batch, prompt, new_tokens)
                    except (RuntimeError, MemoryError) as error:  # such as a batch that does not fit
                        row.error_message = typed_line(error)
        _fill(pair, runs)
    progress("timing both models", total, total)
    return rows, runs


def _fill(pair: Sequence[SpeedRow], runs: Sequence[dict[str, Any]]) -> None:
    """Writes the figures of the runs at a batch into both models' rows."""
    for row in pair:
        if row.error_message is not None:
            continue
        own = [
            run for run in runs if (run["side"], run["batch"], run["counts"]) == (row.side, row.batch, True)
        ]
        prompts, decoded = row.batch * row.prompt, row.batch * (row.new_tokens - 1)
        row.first_token_s = _spread([run["first_token_s"] for run in own])
        row.prefill_tokens_per_s = _spread([prompts / run["first_token_s"] for run in own])
        row.decode_tokens_per_s = _spread([decoded / run["decode_s"] for run in own])
        row.peak_bytes = max(
            (run["peak_bytes"] for run in own if run["peak_bytes"] is not None), default=None
        )
    *_, original = pair
    for row in pair:
        if row.decode_tokens_per_s and original.decode_tokens_per_s:
            row.decode_ratio = row.decode_tokens_per_s[1] / original.decode_tokens_per_s[1]
        if row.prefill_tokens_per_s and original.prefill_tokens_per_s:
            row.prefill_ratio = row.prefill_tokens_per_s[1] / original.prefill_tokens_per_s[1]


def _spread(values: list[float]) -> list[float]:
    return np.quantile(values, (0.2, 0.5, 0.8)).tolist()
