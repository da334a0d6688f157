"""Learning attacks: a model fine-tuned on a task, by every way to do it, each at the best rate that a sweep finds.

The gradients are those of plain autograd: the strategies of systems/ change what a step costs, not what it learns, so
one run stands for all of them.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from ..common.errors import DLRError
from ..convert.evaluate import evaluate
from ..triton_kernels import backend
from .report import Run
from .strategies.model import ModelStrategy, model_strategies, prepared
from .strategies.slot_strategies import Trainable
from .texts import Text

# What is trained, and the rate that a sweep begins with.
TRAINABLES: dict[str, Trainable] = {"full": "weights", "LoRA": "adapters", "attention": "nothing"}
FIRST_RATES = {"full": 1e-4, "LoRA": 1e-3, "attention": 1e-3, "MeZO": 1e-6}
_FACTOR = 10**0.5  # between two rates
_WARM_UP = 0.1  # of the steps, in which the rate grows to its full height; it stays there
_CLIP = 1.0
_PERTURBATION = 1e-3  # of MeZO


@dataclass(frozen=True, slots=True)
class Tuning:
    """How much is tuned. tokens: training tokens of a run; batch: tokens a step; looks: times that the held-out loss is
    measured on the way, evenly; seeds: runs at the best rate, one at the others; rates: tried at most."""

    tokens: int
    batch: int
    looks: int
    seeds: int
    rates: int

    @property
    def runs(self) -> int:
        """Of a sweep, at most."""
        return self.rates + self.seeds - 1

    def sequences(self, n: int) -> int:
        """Sequences of n tokens a step."""
        return max(1, self.batch // n)


Make = Callable[[float, int], Run]  # (rate, seed) -> the run


def sweep(make: Make, first: float, plan: Tuning, seed: int) -> list[Run]:
    """Runs at rates a factor of 3.2 apart: from `first` upwards until it gets worse, downwards where the first step up
    was worse; then the other seeds at the best rate, whose runs are marked. Best: the lowest loss on the curve, of runs
    that did not diverge."""
    runs = [make(first, seed)]
    for factor in (_FACTOR, 1 / _FACTOR):
        rate, last = first, runs[0]
        while len(runs) < plan.rates and not (factor > 1 and last.diverged):
            rate *= factor
            runs.append(make(rate, seed))
            if _lowest(runs[-1]) >= _lowest(last) < math.inf:
                break
            last = runs[-1]
        if last is not runs[0]:
            break  # the other side of `first` is worse
    best = min(runs, key=_lowest)
    others = [make(best.rate, seed + n) for n in range(1, plan.seeds)]
    return [*(replace(run, best=True) for run in (best, *others)), *(run for run in runs if run is not best)]


def fine_tune(
    model: PreTrainedModel,
    mlps: Sequence[str],
    task: Text,
    neutral: Tensor,
    plan: Tuning,
    *,
    variant: str,
    attack: str,
    rate: float,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Run:
    """One run, in the model's dtype and on its device. mlps: names of the modules in the MLPs' places. neutral: tokens
    [S, n] of other text. progress is called with (steps done, steps).

    The model is as before when it ends, whatever ends it. Raises NothingToTrain where there is nothing to train.
    """
    sequences, n = task.train.shape
    batches = _batches(sequences, n, plan, seed)
    batch = batches.shape[1] * n
    looks = {max(1, round(len(batches) * n / plan.looks)) for n in range(1, plan.looks + 1)}
    tokens, losses, seconds = [0], [evaluate(model, task.heldout).loss], []
    before, after = _judged(model, neutral), None
    with trainable(model, mlps, attack, seed) as step:
        try:
            for done, rows in enumerate(batches, 1):
                ids = task.train[rows].to(model.device)
                began = perf_counter()
                step(ids, rate * min(1.0, done / (_WARM_UP * len(batches))))  # reads the loss: it has ended
                seconds.append(perf_counter() - began)
                if done in looks:
                    losses.append(_judged(model, task.heldout))
                    tokens.append(done * batch)
                progress(done, len(batches))
            after = _judged(model, neutral)
        except DivergedError:
            pass
    took = statistics.median(seconds or [0.0])
    return Run(variant, attack, rate, seed, batch, tokens, losses, (before, after), took, after is None)


class DivergedError(Exception):
    """The loss is no number."""


@contextmanager
def trainable(
    model: PreTrainedModel, mlps: Sequence[str], attack: str, seed: int, strategy: ModelStrategy | None = None
) -> Iterator[Callable[[Tensor, float], None]]:
    """The model, ready for an attack by a strategy (None: the plain one), within the block; gives the step: (ids [b, n],
    rate). It raises DivergedError where the loss is no number."""
    with ExitStack() as stack:
        if attack == "MeZO":
            trained = list(model.parameters())
            step: Callable[[Tensor, float], None] = _MeZO(model, trained, seed)
        else:
            strategy = strategy or strategies(attack, locked=False)[0]
            with torch.random.fork_rng():
                torch.manual_seed(seed)  # of the adapters
                trained = stack.enter_context(prepared(model, mlps, strategy))
            step = _Adam(model, trained)
        own = {id(p) for p in model.parameters()}
        before = [(p, p.detach().clone()) for p in trained if id(p) in own]  # adapters are thrown away
        try:
            yield step
        finally:
            with torch.no_grad():
                for parameter, value in before:
                    parameter.copy_(value)
                for parameter in trained:
                    parameter.grad = None


def strategies(attack: str, *, locked: bool) -> list[ModelStrategy]:
    """Those of an attack of TRAINABLES on a locked model or an original; autograd as it is comes first."""
    return [
        strategy for strategy in model_strategies(locked=locked) if strategy.trainable == TRAINABLES[attack]
    ]


class _Adam:
    """AdamW without decay, gradients clipped at norm 1."""

    def __init__(self, model: PreTrainedModel, trained: list[Tensor]) -> None:
        self._model, self._trained = model, trained
        self._optimizer = torch.optim.AdamW(trained, weight_decay=0.0)

    def __call__(self, ids: Tensor, rate: float) -> None:
        loss = _loss(self._model, ids)
        if not math.isfinite(loss.item()):
            raise DivergedError
        loss.backward()
        clip_grad_norm_(self._trained, _CLIP)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()


class _MeZO:
    """Zeroth-order SGD (Malladi et al., arXiv 2305.17333): the loss at two points along a random direction z gives the
    slope, and the weights move by -rate * slope * z. z is drawn again from its seed instead of being kept."""

    def __init__(self, model: PreTrainedModel, trained: list[Tensor], seed: int) -> None:
        self._model, self._trained, self._seed, self._steps = model, trained, seed, 0

    @torch.no_grad()
    def __call__(self, ids: Tensor, rate: float) -> None:
        self._steps += 1
        losses = []
        with backend("naive"):  # the other ways prepare weights, which change here at every pass
            for move in (_PERTURBATION, -2 * _PERTURBATION):
                self._move(move)
                losses.append(_loss(self._model, ids).item())
        slope = (losses[0] - losses[1]) / (2 * _PERTURBATION)
        if not math.isfinite(slope):
            raise DivergedError
        self._move(_PERTURBATION - rate * slope)

    def _move(self, length: float) -> None:
        generator = torch.Generator(self._model.device)
        generator.manual_seed((self._seed << 32) + self._steps)
        for weight in self._trained:
            z = torch.randn(weight.shape, generator=generator, dtype=weight.dtype, device=weight.device)
            weight.add_(z, alpha=length)


def _judged(model: PreTrainedModel, tokens: Tensor) -> float:
    try:
        return evaluate(model, tokens).loss
    except DLRError as error:
        raise DivergedError from error  # `evaluate` takes no loss that is no number


def _loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
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
