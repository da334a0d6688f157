"""Fine-tuning a model on a task by an attack on training, at the best learning rate that a sweep finds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...common.dtypes import fast_products
from ...common.errors import DLRError
from ...common.progress import Count, no_count
from ...convert.evaluate import evaluate
from ..context import ModelVariant
from ..report import Run
from ..texts import Text

if TYPE_CHECKING:
    from .contract import TrainingAttack

_FACTOR = 10**0.5  # between two rates
_WARM_UP = 0.1  # of the steps, in which the rate grows to its full height; it stays there
# Shares of what was gained: so far behind a run is given up, see `lost`; two seeds so close need no third.
_LOST, _ALIKE = 0.1, 0.02

Step = Callable[
    [Tensor, float], None
]  # (token ids [b, n] int64, learning rate): one update of what is trained
Make = Callable[
    [float, int, Run | None], Run
]  # (rate, seed, the run to beat, behind which it is given up) -> the run


class DivergedError(Exception):
    """The loss is no number."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How much is fine-tuned.

    Attributes:
        tokens: Training tokens of a run.
        batch: Tokens of a step.
        looks: How often the held-out loss is measured in a run, at even distances.
        seeds: Runs at the best rate, at most; every other rate has one.
        rates: How many rates are tried at most.
    """

    tokens: int
    batch: int
    looks: int
    seeds: int
    rates: int

    @property
    def runs(self) -> int:
        """How many runs a sweep makes at most."""
        return self.rates + self.seeds - 1

    def sequences(self, n: int) -> int:
        """How many sequences of n tokens make a step."""
        return max(1, self.batch // n)


def sweep(make: Make, first: float, plan: Tuning, seed: int) -> list[Run]:
    """Looks for the best learning rate, among rates a factor of 3.2 apart.

    Upwards from the first rate until it gets worse, and downwards where the first step up was worse. The best run is
    that of the lowest loss anywhere on its curve, among those that did not diverge. All rates have the same seed, so a
    run that is plainly behind the best one so far is given up on its way; and two seeds that gained the same need no
    third.

    Args:
        make: Gives the run at a rate and a seed, given the run that it has to beat, if any.
        first: The first rate.
        plan: How many rates and seeds there are.
        seed: Of the sweep; the further runs at the best rate have the seeds after it.

    Returns:
        The runs at the best rate, marked as such, and then all others.
    """
    runs = [make(first, seed, None)]
    for factor in (_FACTOR, 1 / _FACTOR):
        rate, last = first, runs[0]
        while len(runs) < plan.rates and not (factor > 1 and last.diverged):
            rate *= factor
            runs.append(make(rate, seed, last))
            if _lowest(runs[-1]) >= _lowest(last) < math.inf:
                break
            last = runs[-1]
        if last is not runs[0]:
            break  # the other side of `first` is worse
    best = min(runs, key=_lowest)
    seeds = [best]
    while len(seeds) < plan.seeds and not _alike(seeds):
        seeds.append(make(best.rate, seed + len(seeds), None))
    return [*(replace(run, best=True) for run in seeds), *(run for run in runs if run is not best)]


def lost(losses: Sequence[float], rival: Run | None, looks: int) -> bool:
    """Whether a run is plainly behind another of the same seed, from a third of its looks on: its lowest loss is above
    the other's until then by a tenth of what the other gained, over the share of the run that is done.

    losses: of the run so far, from before any training on. rival: the other; None for none. looks: of a whole run.
    """
    done = (len(losses) - 1) / looks
    if rival is None or rival.diverged or done < 1 / 3:
        return False
    theirs = min(rival.losses[: len(losses)])
    return min(losses) - theirs > _LOST / done * (losses[0] - theirs)


def _alike(runs: Sequence[Run]) -> bool:
    """Whether the lowest losses of two or more seeds are within a fiftieth of what they gained."""
    lowest = [_lowest(run) for run in runs]
    return len(runs) > 1 and max(lowest) - min(lowest) < _ALIKE * (runs[0].losses[0] - min(lowest))


def products(model: PreTrainedModel) -> torch.autocast:
    """A block with the products of runs, see `fast_products`: a step of SmolLM2 takes two thirds of the time so.

    Weights, the optimizer, and a chain's state stay in float32. One block a step: it may keep the weights that it began
    with.
    """
    return fast_products(model.device, model.config.get_text_config().hidden_size)


def fine_tune(
    attack: TrainingAttack,
    variant: ModelVariant,
    task: Text,
    neutral: Tensor,
    plan: Tuning,
    *,
    rate: float,
    seed: int,
    start: tuple[float, float] | None = None,
    rival: Run | None = None,
    progress: Count = no_count,
) -> Run:
    """One run, on the model's device; the model is as before when it ends, whatever ends it.

    Losses are measured in the arithmetic of `products`, and steps are taken in it where the attack allows that.

    Args:
        attack: How the model is trained.
        variant: The model.
        task: The text to train on and to be judged by.
        neutral: Tokens of other text, [S, n] int64, to see a collapse by.
        plan: How much is trained.
        rate: The learning rate at its full height.
        seed: Of the order of the text and of all that the attack draws.
        start: What `losses_of` gives before any training; measured where it is None.
        rival: A run of the same seed, behind which this one is given up, see `lost`.
        progress: Called with (steps done, steps).

    Raises:
        NothingToTrain: Where the model has nothing that the attack trains.
    """
    model = variant.model
    sequences, n = task.train.shape
    batches = _batches(sequences, n, plan, seed)
    batch = batches.shape[1] * n
    looks = {max(1, round(len(batches) * n / plan.looks)) for n in range(1, plan.looks + 1)}
    start = start or losses_of(model, task, neutral)
    tokens, losses, seconds = [0], [start[0]], []
    after, diverged = None, False
    with attack.stepping(variant, seed) as step:
        try:
            for done, rows in enumerate(batches, 1):
                ids = task.train[rows].to(model.device)
                began = perf_counter()
                with products(model) if attack.coarse else nullcontext():
                    step(
                        ids, rate * min(1.0, done / (_WARM_UP * len(batches)))
                    )  # reads the loss: it has ended
                seconds.append(perf_counter() - began)
                if done in looks:
                    losses.append(_judged(model, task.heldout))
                    tokens.append(done * batch)
                    if done < len(batches) and lost(losses, rival, len(looks)):
                        break
                progress(done, len(batches))
            else:
                after = _judged(model, neutral)
        except DivergedError:
            diverged = True
    return Run(
        variant.name,
        attack.name,
        rate,
        seed,
        batch,
        tokens,
        losses,
        (start[1], after),
        statistics.median(seconds or [0.0]),
        diverged,
        given_up=after is None and not diverged,
    )


def losses_of(model: PreTrainedModel, task: Text, neutral: Tensor) -> tuple[float, float]:
    """The held-out loss of the task, and that of neutral text [S, n] int64, in the arithmetic of runs.

    Raises:
        DLRError: As `evaluate` does.
    """
    return _loss(model, task.heldout), _loss(model, neutral)


def _judged(model: PreTrainedModel, tokens: Tensor) -> float:
    try:
        return _loss(model, tokens)
    except DLRError as error:
        raise DivergedError from error  # `evaluate` takes no loss that is no number


def _loss(model: PreTrainedModel, tokens: Tensor) -> float:
    with products(model):
        return evaluate(model, tokens).loss


def task_loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The mean loss of the next token, in nats, of ids [b, n] int64; differentiable."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def _batches(sequences: int, n: int, plan: Tuning, seed: int) -> Tensor:
    """Rows of the training text for every step, [steps, sequences a step] int64: each once before any twice."""
    each = plan.sequences(n)
    steps = max(1, plan.tokens // (each * n))
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * each // sequences)
    rows = torch.cat([torch.randperm(sequences, generator=generator) for _ in range(epochs)])
    return rows[: steps * each].view(steps, each)


def _lowest(run: Run) -> float:
    return math.inf if run.diverged else min(run.losses)
