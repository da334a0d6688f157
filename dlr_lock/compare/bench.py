"""How fast a locked model and its original generate: both in one run, in turns, by transformers' own `generate`.

A run is one call of `generate` for a batch of random prompts. Its clock is a streamer, which is handed every token as
it is there: the first one ends the prefill, the others are decoded.
"""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..common.dtypes import dtype_name
from ..common.errors import DLRError, typed_line
from ..common.hooks import frozen
from ..common.machine import machine
from ..common.progress import Progress, no_progress
from ..convert.use import opened
from ..runtime.device import usable_device
from ..runtime.generation import positions

SIDES = ("locked", "original")
ENGINE = "transformers"
MOST = 2**20  # sequences, tokens or repeats


@dataclass(slots=True)
class SpeedRow:
    """One model at one batch. Figures are [p20, median, p80] over the runs; None: not measured, or not there.

    Attributes:
        side: locked or original.
        batch: Sequences at a time.
        first_token_s: Seconds until the first token of all sequences is there.
        prefill_tokens_per_s: Tokens of prompts over that time.
        decode_tokens_per_s: Tokens behind the first, of all sequences, over the time that they took.
        weights_bytes: Of the model's parameters.
        peak_bytes: These, and by how much memory grew in a run at most: on a GPU what torch allocated, on Linux the
            process's resident memory.
        decode_ratio, prefill_ratio: Of the median to the original's.
        error_message: Why there is nothing.
    """

    side: str
    batch: int
    first_token_s: list[float] | None = None
    prefill_tokens_per_s: list[float] | None = None
    decode_tokens_per_s: list[float] | None = None
    weights_bytes: int | None = None
    peak_bytes: int | None = None
    decode_ratio: float | None = None
    prefill_ratio: float | None = None
    error_message: str | None = None


class Clock(BaseStreamer):
    """When the prompt and every token were handed over, in seconds; the GPU has then computed them."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def bench_model(
    checkpoint: str | Path,
    original: str | Path,
    *,
    prompt: int | None = None,
    new_tokens: int | None = None,
    batches: Sequence[int] | None = None,
    repeats: int | None = None,
    device: torch.device | str | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Times a locked model against its original.

    Args:
        checkpoint: The locked model, see `convert.use.opened`.
        original: The model that was locked.
        prompt: Tokens of a prompt; None for 512 on a GPU, 64 on a CPU.
        new_tokens: Tokens generated for each sequence, 2 or more; None for 128 on a GPU, 16 on a CPU.
        batches: Sequences at a time; None for 1, 8 and 64 on a GPU, 1 and 8 on a CPU.
        repeats: Runs of each model at each batch, after one that does not count; None for 10 on a GPU, 3 on a CPU.
        device: Where the models run, None for the best there is.
        progress: Called with (what is being done, done, total).

    Returns:
        A JSON object: the machine, the settings, a `SpeedRow` for each batch and model, and every run in its order.

    Raises:
        DLRError: On numbers that make no sense, before a model is loaded; on models that cannot be loaded, cannot
            generate, or do not take sequences so long.
    """
    place = usable_device(device)
    gpu = place.type == "cuda"
    prompt = prompt if prompt is not None else 512 if gpu else 64
    new_tokens = new_tokens if new_tokens is not None else 128 if gpu else 16
    batches = list(dict.fromkeys(batches)) if batches is not None else [1, 8, 64] if gpu else [1, 8]
    repeats = repeats if repeats is not None else 10 if gpu else 3
    for name, value, least in (
        ("--prompt", prompt, 1),
        ("--new-tokens", new_tokens, 2),
        ("--repeats", repeats, 1),
    ):
        if not least <= value <= MOST:
            raise DLRError(f"{name} must be from {least} to {MOST}, not {value}")
    if not batches or not all(1 <= batch <= MOST for batch in batches):
        raise DLRError(f"--batches must be numbers from 1 to {MOST}")
    rows: list[SpeedRow] = []
    runs: list[dict[str, Any]] = []
    with ExitStack() as stack:
        models = {
            side: stack.enter_context(opened(source, device=place))[0]
            for side, source in zip(SIDES, (checkpoint, original), strict=True)
        }
        for side, model in models.items():
            _check(side, model, prompt + new_tokens)
        total = len(batches) * (repeats + 1) * len(SIDES)
        for batch in batches:
            pair = [SpeedRow(side, batch, weights_bytes=_weights(models[side])) for side in SIDES]
            rows += pair
            for turn in range(repeats + 1):
                for row in pair if turn % 2 == 0 else pair[::-1]:
                    progress("timing both models", len(runs), total)
                    run: dict[str, Any] = {"side": row.side, "batch": batch, "counts": turn > 0}
                    runs.append(run)
                    if row.error_message is None:
                        try:
                            run |= _timed(models[row.side], batch, prompt, new_tokens)
                        except (RuntimeError, MemoryError) as error:  # such as a batch that does not fit
                            row.error_message = typed_line(error)
            _fill(pair, runs, batch, prompt, new_tokens)
        progress("timing both models", total, total)
        dtype = dtype_name(models["locked"].dtype)
    settings = {
        "prompt": prompt,
        "new_tokens": new_tokens,
        "batches": batches,
        "repeats": repeats,
        "dtype": dtype,
    }
    return {
        "schema": 1,
        **machine(place),
        "engine": ENGINE,
        "settings": settings,
        "rows": [asdict(row) for row in rows],
        "runs": runs,
    }


def _check(side: str, model: PreTrainedModel, length: int) -> None:
    if not model.can_generate():
        raise DLRError(f"the {side} model, a {type(model).__name__}, cannot generate text")
    limit = positions(model)
    if limit is not None and length > limit:
        raise DLRError(
            f"prompt and new tokens make {length} tokens, the {side} model takes {limit}: ask for fewer"
        )


def _timed(model: PreTrainedModel, batch: int, prompt: int, new_tokens: int) -> dict[str, Any]:
    """One run: seconds to the first token and behind it, and by how many bytes memory grew."""
    source = torch.Generator().manual_seed(batch)
    ids = torch.randint(model.config.get_text_config().vocab_size, (batch, prompt), generator=source)
    ids = ids.to(model.device)
    gpu = model.device.type == "cuda"
    clock = Clock()
    grown = _growth(model.device)
    with frozen(model):
        began = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
            cache_implementation="static" if gpu else None,  # which generate() then compiles
        )
    _, first, *_, last = clock.times
    if len(clock.times) != new_tokens + 1:
        raise RuntimeError(f"{len(clock.times) - 1} tokens came instead of {new_tokens}")
    return {"first_token_s": first - began, "decode_s": last - first, "grown_bytes": grown()}


def _growth(device: torch.device) -> Callable[[], int | None]:
    """Starts to watch how far memory grows; what it gives says by how many bytes it did, None where nobody counts."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = _resident("VmRSS")
    if start is None:
        return lambda: None
    return lambda: max(0, (_resident("VmHWM") or start) - start)


def _resident(name: str) -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return None


def _weights(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _fill(pair: list[SpeedRow], runs: list[dict[str, Any]], batch: int, prompt: int, new_tokens: int) -> None:
    """Writes the figures of the runs at a batch into both models' rows."""
    for row in pair:
        own = [run for run in runs if (run["side"], run["batch"], run["counts"]) == (row.side, batch, True)]
        if row.error_message is not None:
            continue
        row.first_token_s = _spread([run["first_token_s"] for run in own])
        row.prefill_tokens_per_s = _spread([batch * prompt / run["first_token_s"] for run in own])
        row.decode_tokens_per_s = _spread([batch * (new_tokens - 1) / run["decode_s"] for run in own])
        grown = [run["grown_bytes"] for run in own if run["grown_bytes"] is not None]
        if grown and row.weights_bytes is not None:
            row.peak_bytes = row.weights_bytes + max(grown)
    _, original = pair
    for row in pair:
        if row.decode_tokens_per_s and original.decode_tokens_per_s:
            row.decode_ratio = row.decode_tokens_per_s[1] / original.decode_tokens_per_s[1]
        if row.prefill_tokens_per_s and original.prefill_tokens_per_s:
            row.prefill_ratio = row.prefill_tokens_per_s[1] / original.prefill_tokens_per_s[1]


def _spread(values: list[float]) -> list[float]:
    return np.quantile(values, (0.2, 0.5, 0.8)).tolist()
