"""MeZO, zeroth-order fine-tuning (Malladi et al., arXiv 2305.17333): two forward passes a step, and no backward."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...triton_kernels import backend
from ...triton_kernels.meter import Meter
from ..context import ModelVariant
from ..meters import countable, step_tokens
from ..report import StepCost
from .contract import TrainingAttack, register
from .fine_tune import DivergedError, Step, task_loss

_PERTURBATION = 1e-3
_PASSES = 2  # of inference in a step


class MeZO(TrainingAttack):
    """Trains all weights, in an inference pass's memory; it takes ten to a hundred times the steps."""

    name = "MeZO"
    about = "All weights are moved along random directions, by what two forward passes say of each; no backward pass."
    first_rate = 1e-6
    budgets = ("full",)
    coarse = False  # its slope is the small difference of two losses

    @contextmanager
    def prepared(
        self, variant: ModelVariant, seed: int, strategy: str | None = None
    ) -> Iterator[tuple[list[Tensor], Step]]:
        trained: list[Tensor] = list(variant.model.parameters())
        yield trained, _Step(variant.model, trained, seed)

    def count_steps(self, variant: ModelVariant, shape: tuple[int, int]) -> list[StepCost]:
        mode, ghost = countable(variant.model)
        meter = Meter()
        # The other ways prepare weights, which change here at every pass.
        with mode, torch.no_grad(), meter, backend("naive"):
            ids = step_tokens(variant.model, shape)
            ghost(input_ids=ids, use_cache=False)
        counts = meter.take()
        return [
            StepCost(
                variant.name, self.name, self.name, shape[0] * shape[1], _PASSES * counts.flops, meter.peak, 0,
                _PASSES * counts.launches, _PASSES * counts.dependent,
            )
        ]  # fmt: skip


class _Step:
    """The loss at two points along a random direction z gives the slope, and the weights move by -rate * slope * z.

    z is drawn again from its seed instead of being kept.
    """

    def __init__(self, model: PreTrainedModel, trained: list[Tensor], seed: int) -> None:
        self._model, self._trained = model, trained
        # A generator of the CPU reads the lower 32 bits of a seed and no more: a run's seed has to be mixed into them.
        self._seeds = torch.Generator().manual_seed(seed)
        self._seed = 0

    @torch.no_grad()
    def __call__(self, ids: Tensor, rate: float) -> None:
        self._seed = int(torch.randint(2**31, (), generator=self._seeds))
        losses = []
        with backend("naive"):  # the other ways prepare weights, which change here at every pass
            for move in (_PERTURBATION, -2 * _PERTURBATION):
                self._move(move)
                losses.append(task_loss(self._model, ids).item())
        slope = (losses[0] - losses[1]) / (2 * _PERTURBATION)
        if not math.isfinite(slope):
            raise DivergedError
        self._move(_PERTURBATION - rate * slope)

    def _move(self, length: float) -> None:
        generator = torch.Generator(self._model.device)
        generator.manual_seed(self._seed)
        for weight in self._trained:
            z = torch.randn(weight.shape, generator=generator, dtype=weight.dtype, device=weight.device)
            weight.add_(z, alpha=length)


register(MeZO())
