"""Attacks by gradient descent: AdamW on all weights, or on low-rank adapters of some.

The gradients are those of plain autograd: strategies change what a step costs, not what it learns, so one run stands
for all of them.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from ..context import ModelVariant
from ..meters import count_step, countable, step_tokens
from ..report import StepCost
from ..strategies.model import NothingToTrain, prepared
from ..strategies.table import Strategy, Trainable, model_strategies
from .contract import TrainingAttack, register
from .fine_tune import DivergedError, Step, task_loss

_CLIP = 1.0


@dataclass(frozen=True)
class GradientAttack(TrainingAttack):
    """AdamW without decay, gradients clipped at norm 1, on what the strategies of `trainable` train.

    The rate is that of a matrix of the median size. Where weights are trained, not adapters, a matrix has it in
    proportion to its RMS, as Adafactor has (Shazeer and Stern, arXiv 1804.04235). A chain's B is a twentieth of an
    MLP's matrices: at one rate for all weights six locked layers of SmolLM2 ended at a loss of 2.74, so at 1.26. The
    original's end, 1.20 and 1.23, is the same by both.

    Attributes:
        name, about, first_rate, spares_chains: See `TrainingAttack`.
        trainable: What the strategies train, see `strategies.table`.
    """

    name: str
    about: str
    first_rate: float
    trainable: Trainable
    spares_chains: bool = False

    def trained(
        self, model: PreTrainedModel, variant: ModelVariant, strategy: Strategy
    ) -> AbstractContextManager[list[Tensor]]:
        """What is trained of a variant's model, or of its ghost, while that is as the strategy trains it."""
        return prepared(model, variant.mlps, strategy, variant.locked if self.spares_chains else ())

    def strategies(self, variant: ModelVariant) -> list[Strategy]:
        """The strategies that serve the attack; autograd as it is comes first."""
        return [s for s in model_strategies(locked=variant.deep) if s.trainable == self.trainable]

    @contextmanager
    def prepared(
        self, variant: ModelVariant, seed: int, strategy: str | None = None
    ) -> Iterator[tuple[list[Tensor], Step]]:
        chosen = next(s for s in self.strategies(variant) if strategy in (None, s.name))
        with ExitStack() as stack:
            with torch.random.fork_rng():
                torch.manual_seed(seed)  # of the adapters
                trained = stack.enter_context(self.trained(variant.model, variant, chosen))
            yield trained, _Adam(variant.model, trained, by_size=self.trainable == "weights")

    def count_steps(self, variant: ModelVariant, shape: tuple[int, int]) -> list[StepCost]:
        mode, ghost = countable(variant.model)
        rows = []
        for strategy in self.strategies(variant):
            try:
                with mode, self.trained(ghost, variant, strategy) as trained:
                    ids = step_tokens(variant.model, shape)
                    counts = count_step(lambda tokens: task_loss(ghost, tokens), ids, trained)
            except NothingToTrain:
                continue
            rows.append(StepCost(
                variant.name, self.name, strategy.name, shape[0] * shape[1], counts.flops, counts.peak, counts.held,
                counts.forward.launches + counts.backward.launches, counts.dependent,
            ))  # fmt: skip
        return rows


class _Adam:
    def __init__(self, model: PreTrainedModel, trained: list[Tensor], *, by_size: bool) -> None:
        self._model, self._trained = model, trained
        fused = model.device.type in (
            "cpu",
            "cuda",
        )  # a quarter of a step of all weights of SmolLM2, on a CPU
        sizes = _sizes(trained) if by_size else [1.0] * len(trained)
        groups = [{"params": [p], "size": size} for p, size in zip(trained, sizes, strict=True)]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=fused)

    def __call__(self, ids: Tensor, rate: float) -> None:
        loss = task_loss(self._model, ids)
        if not math.isfinite(loss.item()):
            raise DivergedError
        loss.backward()
        clip_grad_norm_(self._trained, _CLIP)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["size"]
        self._optimizer.step()
        self._optimizer.zero_grad()


def _sizes(weights: Sequence[Tensor]) -> list[float]:
    """The RMS of each matrix over their median, and 1 for vectors and for what is zero."""
    rms = [w.detach().float().square().mean().sqrt().item() if w.dim() > 1 else 0.0 for w in weights]
    median = statistics.median([size for size in rms if size] or [1.0])
    return [size / median if size else 1.0 for size in rms]


for _attack in (
    GradientAttack(
        "full", "All weights are trained, a matrix at a rate in proportion to its size.", 1e-4, "weights"
    ),
    GradientAttack(
        "LoRA", "Low-rank adapters of the chains and of all that is linear are trained.", 1e-3, "adapters"
    ),
    GradientAttack(
        "outside", "All weights but those in the chains' places are trained, likewise.", 1e-4, "weights", True
    ),
    GradientAttack(
        "PEFT",
        "Low-rank adapters of all that is linear outside the chains are trained, as PEFT finds it in a locked model.",
        1e-3,
        "adapters",
        True,
    ),
):
    register(_attack)
