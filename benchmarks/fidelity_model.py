"""The studies of whole models of `fidelity`: rows of a conversion before and after its end-to-end phase."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlr_lock import DLRError, DLRNet
from dlr_lock.common.hooks import frozen
from dlr_lock.convert.activations.capture import capture
from dlr_lock.convert.config import ConversionConfig
from dlr_lock.convert.context import Context
from dlr_lock.convert.end_to_end import flatten_gaps, with_chains
from dlr_lock.convert.evaluate import compare
from dlr_lock.convert.redistill import fit_student
from dlr_lock.microbench.bench import numbers
from dlr_lock.progress import Steps

from .whole_model import fitted, kept, point, study, train_together

LOOKS = 4  # at the model during the end-to-end phase, its end counted
Figures = Callable[[Any, Any, Any], dict[str, Any]]  # of (locked model, original, tokenizer)


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a study.

    Attributes:
        options: Of the command line.
        config: Of the conversion, resolved.
        shares: Of the training tokens, that students get.
        target: Beside it lie the finished modules of an interrupted run.
        rows: Those that are finished.
        progress: Shown meanwhile.
    """

    options: argparse.Namespace
    config: ConversionConfig
    shares: list[float]
    target: Path
    rows: list[dict[str, Any]]
    progress: Steps


def model(job: Job) -> Iterator[dict[str, Any]]:
    """For each way across the layers and each length of fits a row, and one more after the end-to-end phase."""
    yield from _whole(job, lambda locked, original, tokenizer: {})


def sentences(job: Job) -> Iterator[dict[str, Any]]:
    """As `model`, with the embeddings of sentences: mean cosine of locked and original, and Spearman's correlation
    of all pairs' similarities."""
    lines = [line for line in job.options.sentences.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < 3:
        raise DLRError(f"{job.options.sentences} has {len(lines)} lines: give sentences, one a line")

    def figures(locked: Any, original: Any, tokenizer: Any) -> dict[str, Any]:
        ours, theirs = (embed(m, tokenizer, lines) for m in (locked, original))
        cosines = (ours * theirs).sum(1)
        return {
            "sentences": len(lines),
            "embedding_cosine": cosines.mean().item(),
            "worst_cosine": cosines.min().item(),
            "spearman": spearman(*((e @ e.T)[_pairs(len(lines))] for e in (ours, theirs))),
        }

    yield from _whole(job, figures)


def embed(model: Any, tokenizer: Any, lines: list[str]) -> Tensor:
    """[N, d] float32 of length 1: the mean of the last hidden states over a sentence's tokens."""
    parts = []
    for begin in range(0, len(lines), 64):
        batch = tokenizer(lines[begin : begin + 64], padding=True, truncation=True, return_tensors="pt")
        batch = batch.to(model.device)
        with frozen(model):
            states = model(**batch)[0].float()
        there = batch["attention_mask"][..., None].float()
        mean = (states * there).sum(1) / there.sum(1)
        parts.append(torch.nn.functional.normalize(mean, dim=1).cpu())
    return torch.cat(parts)


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two samples [N]; ties in the order they come."""
    ranks = [np.argsort(np.argsort(t.numpy(), kind="stable"), kind="stable") for t in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def _pairs(count: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(count, count, 1)
    return rows, columns


def _whole(job: Job, figures: Figures) -> Iterator[dict[str, Any]]:
    """Rows of every conversion. Seconds and FLOPs are of all that led to the chains, the measuring left out; a row that
    was finished by an interrupted run is not made again."""
    choices = [
        replace(job.config, across=across, train_tokens=count).resolved()
        for across in job.options.across.split(",")
        for count in numbers(job.options.train_tokens)
    ]
    with study(job.options.model, job.config, job.progress) as base:
        for config in choices:
            done = {
                row["phase"]: row
                for row in job.rows
                if (row["across"], row["train_tokens"]) == (config.across, config.train_tokens)
            }
            target = job.target.with_name(f"{job.target.name}-{config.across}-{config.train_tokens}")
            if len(done) <= bool(config.end_to_end):
                with kept(base, config, target) as context:
                    yield from _rows(context, done.get("modules"), job.shares, figures)
                    context.resume.remove()  # by now the last row is written


def _rows(
    context: Context, first: dict[str, Any] | None, shares: list[float], figures: Figures
) -> Iterator[dict[str, Any]]:
    """first: that of the fits, where an interrupted run has written it."""
    model, text, config = context.model, context.text, context.config
    chains, reports = fitted(context)
    seconds = context.resume.seconds

    def look(locked: Any, end_to_end: int, seconds: float) -> dict[str, Any]:
        made = point(context, locked, end_to_end=end_to_end, seconds=seconds)
        return made | figures(locked, model, context.source.tokenizer)

    def row(phase: str, chains: Any, end_to_end: int, seconds: float) -> dict[str, Any]:
        locked = with_chains(model, chains, context.identity)
        return {
            "phase": phase,
            "across": config.across,
            "layers": len(context.mlps),
            **look(locked, end_to_end, seconds),
            "gaps": flatten_gaps(locked, chains, text.heldout),
            "students": {
                f"{share:g}": compare(students, model, text.heldout).to_dict()
                for share in shares
                for students in [
                    _redistilled(context, locked, chains, round(share * (config.train_tokens or 0)))
                ]
            },
        }

    if first is None:
        first = row("modules", chains, 0, seconds) | {"modules": [report.to_dict() for report in reports]}
        yield first
    if not config.end_to_end:
        return
    before, looks = first["seconds"], []
    start = first["kl"] if "kl" in first else first["state_error"]
    chains, losses, seconds = train_together(
        context,
        chains,
        start,
        LOOKS,
        lambda done, took, locked: looks.append(look(locked, done, before + took)),
    )
    yield row("end_to_end", chains, config.end_to_end, before + seconds) | {"looks": looks, "curve": losses}


def _redistilled(context: Context, locked: Any, chains: dict[str, DLRNet], train_tokens: int) -> Any:
    """The locked model with every chain distilled back, on the activations that it gets there."""
    students = {}
    own = capture(
        locked,
        context.mlps,
        context.tokens,
        max_memory=int(context.config.max_memory or 0),
        scratch=context.scratch,
        progress=context.count("activations of the locked model"),
    )
    for mlp, pairs in own:
        students[mlp.module] = fit_student(
            chains[mlp.module].float(),
            pairs,
            context.train_rows,
            train_tokens=max(1, train_tokens),
            init="linear",
            seed=context.config.seed + mlp.layer,
            name=mlp.module,
            device=context.device,
            progress=context.count(f"redistilling layer {mlp.layer}, {train_tokens:,} training tokens"),
        )
    return with_chains(locked, students, [])
