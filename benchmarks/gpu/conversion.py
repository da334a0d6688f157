"""Stage `conversion`: all layers of a model locked at ascending cost, and what is left of the model at each: a curve.

First module fits of up to 20 times standard's training tokens, then the end-to-end phase, from the longest fits that
were done. A point is written as soon as it is measured, and begun where the time for it is likely to be there: a short
visit has the cheap end of the curve, and the next one goes on from there. Without --model it is SmolLM2-135M-Instruct,
fetched as `dlr-lock demo` does; where that cannot be had, one of random weights and its sizes: the speed is real then,
the fidelity that of MLPs without structure, and every row says so. Without --data the text is Python's help topics.
Each row has the FLOP/s that its fits, or its end-to-end phase, reach by a plan's count, and their share of what one
large product reaches on the device.
"""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dlr_lock import DLRError
from dlr_lock.audit.demo import fetch_model
from dlr_lock.common.cache import cache_folder
from dlr_lock.common.dtypes import dtype_name, product_dtype
from dlr_lock.convert.config import EFFORTS, ConversionConfig
from dlr_lock.convert.context import Context
from dlr_lock.convert.data import english_topics
from dlr_lock.convert.end_to_end import flatten_gaps, with_chains
from dlr_lock.convert.evaluate import predicts_next
from dlr_lock.microbench.timing import measured_rates

from ..output import ROOT
from ..whole_model import fitted, kept, point, study, train_together
from . import build
from .rows import ConversionRow
from .stage import Record

SHARES = (
    80,
    20,
    5,
    1,
)  # of the most training tokens of a module that are fitted: quick's on a CPU, and on to a GPU's
PHASES = (256, 64, 16, 4, 1)  # of the most training tokens of the end-to-end phase, that of effort best
_FITS = 2 / 3  # share of the time that is there, which fits may take
_CERTAIN = 0.9  # share of the time left, that a forecast may fill
_TEXT = "Python's help topics"
_BYTES = 5.0  # of a text that make a token, at most: Python's help topics have 4.0, other prose up to 4.8


class _TimeUp(Exception):
    """A point is given up; its finished modules are kept."""


@dataclass(frozen=True, slots=True)
class Point:
    """One conversion. train_tokens: of a module; None for those of the longest fits that were measured."""

    train_tokens: int | None
    end_to_end: int

    @property
    def name(self) -> str:
        return f"end to end {self.end_to_end}" if self.end_to_end else f"fits {self.train_tokens}"


def points(device: torch.device, *, smoke: bool) -> list[Point]:
    """The curve, in the order in which it is measured."""
    if smoke:
        return [Point(1024, 0), Point(4096, 0), Point(None, 1024)]
    fits, phase = EFFORTS["standard"].on(device).train_tokens, EFFORTS["best"].on(device).end_to_end
    return [Point(fits // share, 0) for share in SHARES] + [Point(None, phase // share) for share in PHASES]


def measure(record: Record) -> None:
    """Rows of all points that there is time for."""
    curve = points(record.device, smoke=record.smoke)
    missing = 0

    def told(what: str, done: int, total: int) -> None:
        record.alive(what)
        if record.left() <= 0:
            raise _TimeUp

    with TemporaryDirectory() as scratch:
        source, random = _source(record, Path(scratch))
        # Not beside the results, which somebody takes home: these are 300 MB.
        folder = Path(scratch) if record.smoke else ROOT / "build" / "gpu"
        config = _choices(record, Path(scratch))
        try:
            with study(source, config, told) as base:
                if not predicts_next(base.model):
                    raise DLRError(
                        f"{source.name} has no language-model head, so that there is no KL to measure"
                    )
                dtype = product_dtype(record.device, base.mlps[0].hidden_size)
                record.document["measured_rates"] = measured_rates(record.device, dtype).to_dict()
                record.document["settings"]["dtype"] = dtype_name(dtype)
                budget = record.left()
                for job in record.unmeasured(curve, lambda job: {"name": job.name}):
                    fits = _longest(record.rows)
                    if not _fits_in(job, record, budget):
                        missing += 1
                        record.stop(f"without {missing} of {len(curve)}: too long for the time left")
                        continue
                    count = job.train_tokens or fits["train_tokens"]
                    choices = replace(config, train_tokens=count, end_to_end=job.end_to_end)
                    target = folder / f"{record.name}-{count}"
                    with kept(base, choices, target) as context:
                        record.add(_row(record, context, job, source, random=random, fits=fits))
                    if not job.end_to_end:
                        _remove(folder, record, but=f"{target.name}.partial")
        except _TimeUp:
            record.stop(f"after {len(record.rows)} of {len(curve)}: the limit of time")
        if all(record.has(name=job.name) for job in curve):
            _remove(folder, record)


def _longest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the longest fits, {} where there is none."""
    fits = [row for row in rows if not row["end_to_end"]]
    return max(fits, key=lambda row: row["train_tokens"], default={})


def _fits_in(job: Point, record: Record, budget: float) -> bool:
    """Whether the time left will do for a point, by the last of its kind, whose time grows with its training tokens."""
    fits = _longest(record.rows)
    if not job.end_to_end:
        return not fits or forecast(fits, job.train_tokens or 0) <= record.left() - (1 - _FITS) * budget
    done = [row for row in record.rows if row["end_to_end"] and row["train_tokens"] == fits["train_tokens"]]
    if not done:
        return bool(fits)
    return forecast(done[-1], job.end_to_end, fits) <= _CERTAIN * record.left()


def forecast(row: dict[str, Any], tokens: int, fits: dict[str, Any] | None = None) -> float:
    """Seconds that a point of so many training tokens takes, by a measured one. fits: the fits before the end-to-end
    phase, where it is one of that."""
    if fits is None:
        return row["seconds"] * tokens / row["train_tokens"]
    return (row["seconds"] - fits["seconds"]) * tokens / row["end_to_end"]


def _row(
    record: Record, context: Context, job: Point, source: Path, *, random: bool, fits: dict[str, Any]
) -> ConversionRow:
    """Fits the modules, or takes those that are kept, trains all together where that is asked for, and measures."""
    chains, reports = fitted(context)
    seconds = context.resume.seconds
    if job.end_to_end:
        chains, _, took = train_together(context, chains, fits["kl"])
        seconds = fits["seconds"] + took
    locked = with_chains(context.model, chains, context.identity)
    found = point(context, locked, end_to_end=job.end_to_end, seconds=seconds)
    before = fits if job.end_to_end else {"flops": 0.0, "seconds": 0.0}
    reached = (found["flops"] - before["flops"]) / (seconds - before["seconds"]) / 1e12
    named = ("train_tokens", "end_to_end", "seconds", "flops", "original_loss", "loss", "kl", "flips")
    data = record.options.data
    return ConversionRow(
        name=job.name,
        model=f"random weights, {source.name}" if random else source.name,
        random=random,
        text=data.name if data else _TEXT,
        layers=len(context.mlps),
        tokens=context.text.train.numel(),
        smallest_gap=min(flatten_gaps(locked, chains, context.text.heldout).values()),
        largest_rel_error=max(module.fidelity.rel_error for module in reports),
        tflop_per_s=reached,
        matmul_percent=100 * reached / record.document["measured_rates"]["matmul_tflop_per_s"],
        **{name: found[name] for name in named},
    )


def _remove(folder: Path, record: Record, but: str = "") -> None:
    """Gives up the modules that no point needs any more: all that are kept, but in one folder."""
    for path in folder.glob(f"{record.name}-*.partial"):
        if path.name != but:
            shutil.rmtree(path)


def _choices(record: Record, scratch: Path) -> ConversionConfig:
    """Of all points, but for their training tokens."""
    data = record.options.data or scratch / "topics.txt"
    if not data.exists():
        data.write_text(english_topics(), encoding="utf-8")
    sizes = {"tokens": 2048, "heldout": 512, "batch": 256, "sequence": 64} if record.smoke else _tokens(data)
    return ConversionConfig(
        data=str(data), redistill=0.0, end_to_end=0, train_tokens=1024, device=str(record.device), **sizes
    ).resolved()


def _tokens(data: Path) -> dict[str, int]:
    """What a text certainly has, where its size tells; {} for the effort's own."""
    if data.suffix != ".txt":
        return {}
    tokens = min(8 * EFFORTS["standard"].tokens, int(data.stat().st_size / _BYTES))
    return {"tokens": tokens * 9 // 10, "heldout": max(512, min(10_240, tokens // 10))}


def _source(record: Record, scratch: Path) -> tuple[Path, bool]:
    """The model to convert, and whether its weights are random."""
    if record.options.model is not None:
        return record.options.model, False
    if not record.smoke:
        # Where there is no network pip would go on trying for longer than a stage may be silent.
        os.environ |= {"PIP_RETRIES": "0", "PIP_DEFAULT_TIMEOUT": "20"}
        try:
            return fetch_model(cache_folder()), False
        except DLRError as error:
            print(f"conversion: {error}: a model of random weights instead", flush=True)
    shape = build.TINY[0] if record.smoke else build.SHAPES[0]
    tokenizer = _tokenizer(shape.vocabulary if record.smoke else 4096)
    folder = scratch / f"{shape.name}'s sizes"
    model = build.original(shape, torch.float32, torch.device("cpu"))
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, True


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte pairs of the help topics."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        english_topics()[:200_000].split("\n\n"),
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
