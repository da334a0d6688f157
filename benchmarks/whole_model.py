"""A whole locked model against what it took: module fits, then the end-to-end phase, looked at on its way.

`fidelity` draws KL against minutes and FLOPs of what stands here; the conversion stage of `make gpu` is the same curve.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from dlr_lock.common.progress import Progress
from dlr_lock.common.resume import ResumeStore, run_lock
from dlr_lock.convert.config import ConversionConfig
from dlr_lock.convert.context import Context
from dlr_lock.convert.data import calibration_text
from dlr_lock.convert.end_to_end import EndToEndPlan, train_end_to_end
from dlr_lock.convert.evaluate import compare
from dlr_lock.convert.mlp_discovery import find_mlps, select_layers
from dlr_lock.convert.outlook.amounts import Amounts, reckoned
from dlr_lock.convert.outlook.phases import chain_flops
from dlr_lock.convert.pipeline import distill_modules
from dlr_lock.convert.report import ModuleReport
from dlr_lock.convert.source import compute_dtype, open_source
from dlr_lock.convert.sources.preparation import facts_of
from dlr_lock.convert.writing import restored
from dlr_lock.runtime import DLRNet

STORED = torch.float32  # what is studied is the fit, not a checkpoint's rounding


@contextmanager
def study(source: str | Path, config: ConversionConfig, progress: Progress) -> Iterator[Context]:
    """A conversion of which nothing is kept. config: resolved."""
    device = torch.device(str(config.device))
    original = open_source(source, dtype=compute_dtype(device), device=device)
    text = calibration_text(original, config, progress)
    every = find_mlps(original.model)
    mlps = select_layers(every, config.layers)
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        amounts = reckoned(original, mlps, every, config)
        resume = ResumeStore(scratch / "kept", {})
        yield Context(original, mlps, text, config, STORED, resume, scratch, progress, amounts=amounts)


@contextmanager
def kept(context: Context, config: ConversionConfig, target: Path) -> Iterator[Context]:
    """The study with choices of its own for the training, its finished modules in `<target>.partial` until they are
    removed: an interrupted one goes on from there. Raises DLRError where they are of another model, text or choices."""
    assert context.amounts is not None
    amounts = Amounts.of(context.amounts.subject, config, context.amounts.gpu_memory)
    with run_lock(target):
        facts = facts_of(context.source, context.mlps, context.text, config, context.stored)
        yield replace(context, config=config, amounts=amounts, resume=ResumeStore(target, facts))


def fitted(context: Context) -> tuple[dict[str, DLRNet], list[ModuleReport]]:
    """The chains of all modules and their reports; where all are kept nothing is computed."""
    found = [restored(context.resume, context.model, mlp.module, context.stored) for mlp in context.mlps]
    modules = [module for module in found if module is not None]
    if len(modules) == len(found):
        return {report.module: net for net, report in modules}, [report for _, report in modules]
    done = distill_modules(context)
    return dict(done.chains), done.reports


def point(context: Context, locked: PreTrainedModel, *, end_to_end: int, seconds: float) -> dict[str, Any]:
    """A point of the curve: what a locked model took, and the figures of its evaluation on held-out text.

    Args:
        context: Its conversion.
        locked: The model.
        end_to_end: Training tokens of all chains together so far.
        seconds: Of all that led there.
    """
    assert context.amounts is not None
    amounts = replace(context.amounts, config=replace(context.config, end_to_end=end_to_end))
    micro = context.micro_batch("the measuring of the model", "sequence")
    return {
        "train_tokens": context.config.train_tokens,
        "end_to_end": end_to_end,
        "seconds": seconds,
        "flops": chain_flops(amounts),
        **compare(locked, context.model, context.text.heldout, micro=micro).to_dict(),
    }


def train_together(
    context: Context,
    chains: dict[str, DLRNet],
    start: float,
    looks: int = 1,
    look: Callable[[int, float, PreTrainedModel], object] = lambda trained, seconds, locked: None,
) -> tuple[dict[str, DLRNet], list[tuple[int, float]], float]:
    """The end-to-end phase of a conversion.

    Args:
        context: The conversion.
        chains: As they were fitted.
        start: How far the model with them is from the original, see `EndToEndPlan`.
        looks: In how many parts of equal length it is looked at; the end, whose chains are returned, is none.
        look: Called at the end of each but the last with (training tokens, seconds, the locked model as it is then).

    Returns:
        The chains; (training tokens, loss) of every batch; seconds, without those of the looks.
    """
    config, micro = context.config, context.micro_batch("the end-to-end phase", "sequence")
    tokens = int(config.end_to_end or 0)
    due = [tokens * part / looks for part in range(1, looks)]
    losses: list[tuple[int, float]] = []
    started, looking = time.monotonic(), 0.0

    def watch(trained: int, loss: float, locked: PreTrainedModel) -> None:
        nonlocal due, looking
        losses.append((trained, loss))
        passed = [at for at in due if at <= trained]
        due = due[len(passed) :]
        if passed and trained < tokens:
            began = time.monotonic()
            look(trained, began - started - looking, locked)
            looking += time.monotonic() - began

    plan = EndToEndPlan(tokens, start=start, seed=config.seed)
    trained = train_end_to_end(
        context.model, chains, context.identity, context.text.unseen(tokens), plan,
        progress=context.count("end-to-end phase"), watch=watch, micro=micro,
    )  # fmt: skip
    return trained, losses, time.monotonic() - started - looking
