"""What an attack on training is: one object of this class, registered once.

The command line's choices and errors, the sweep, the costs, the verdicts and every form of the report take attacks from
the registry and know none by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..context import AuditContext, ModelVariant
from ..report import Run, StepCost
from ..strategies.model import NothingToTrain
from .fine_tune import Step, fine_tune, losses_of, sweep

NEUTRAL_SEQUENCES = 2  # of held-out neutral text, for the collapse check


class TrainingAttack(ABC):
    """A way to train a model on a task.

    Attributes:
        name: What the command line and the report call it; no comma.
        about: What it does, a sentence for an owner who has not read the paper.
        first_rate: The learning rate that the first model's sweep begins with.
        budgets: The names of the budgets that run it where `--attacks` does not say.
        spares_chains: Whether it leaves locked MLPs' places as they are. It is not tried on models whose chains were
            undone: who did that would only pay more for the same.
        coarse: Whether its runs' products may be in bfloat16, see `fine_tune.products`.
    """

    name: str
    about: str
    first_rate: float
    budgets: tuple[str, ...] = ("quick", "full")
    spares_chains: bool = False
    coarse: bool = True

    @abstractmethod
    def prepared(
        self, variant: ModelVariant, seed: int, strategy: str | None = None
    ) -> AbstractContextManager[tuple[list[Tensor], Step]]:
        """The model ready to be trained, within the block.

        Args:
            variant: The model. What the step changes beyond its weights is undone when the block ends.
            seed: Of all that is drawn.
            strategy: The name of one of the strategies that `count_steps` gave; None for the first of them.

        Returns:
            The tensors that are trained, and the step. A step raises DivergedError where the loss is no number.

        Raises:
            NothingToTrain: Where the model has nothing that this attack trains.
        """

    @abstractmethod
    def count_steps(self, variant: ModelVariant, shape: tuple[int, int]) -> list[StepCost]:
        """What a step costs, counted.

        Args:
            variant: The model.
            shape: Sequences of a step, and tokens of each.

        Returns:
            A row for every strategy that gives the same gradients, the plain one first; none where there is nothing
            to train.
        """

    @contextmanager
    def stepping(self, variant: ModelVariant, seed: int, strategy: str | None = None) -> Iterator[Step]:
        """The step of `prepared`, within a block that ends with the model as it was, whatever ends it."""
        with self.prepared(variant, seed, strategy) as (trained, step):
            own = {id(p) for p in variant.model.parameters()}
            before = [(p, p.detach().clone()) for p in trained if id(p) in own]  # adapters are thrown away
            try:
                yield step
            finally:
                with torch.no_grad():
                    for parameter, value in before:
                        parameter.copy_(value)
                    for parameter in trained:
                        parameter.grad = None

    def run(self, context: AuditContext, variant: ModelVariant) -> list[Run]:
        """Every run of the attack on a model: a sweep for the best rate, and further seeds there.

        Where the model has nothing to train, or the best rate is the last one tried, the context gets a note.
        """
        title = f"fine-tuning the {variant.name} model, {self.name}"
        plan, begun = context.config.plan, context.runs_begun
        neutral = context.neutral.heldout[:NEUTRAL_SEQUENCES]
        start = context.part(f"start {variant.name}", lambda: losses_of(variant.model, context.task, neutral))

        def make(rate: float, seed: int, rival: Run | None) -> Run:
            context.runs_begun += 1
            what = f"run {context.runs_begun} of at most {context.runs_at_most}: {title}, rate {rate:.1e}, seed {seed}"

            def tuned() -> dict[str, Any]:
                run = fine_tune(
                    self,
                    variant,
                    context.task,
                    neutral,
                    plan,
                    rate=rate,
                    seed=seed,
                    start=tuple(start),
                    rival=rival,
                    progress=context.count(what),
                )
                return asdict(run)

            part = f"run {variant.name} {self.name} {rate:.9g} {seed}"
            context.runs_kept += context.resume is not None and context.resume.has(part)
            context.expect_runs()
            values = context.part(part, tuned)
            return Run(**values | {"neutral": tuple(values["neutral"])})

        try:
            first = context.rates.get(self.name, self.first_rate)
            runs = sweep(make, first, plan, context.config.seed)
        except NothingToTrain as error:
            context.notes.append(f"{title}: not done, {error}")
            return []
        finally:
            context.runs_at_most -= plan.runs - (context.runs_begun - begun)
        context.rates[self.name] = runs[0].rate
        rates = sorted({run.rate for run in runs})
        if len(rates) > 1 and runs[0].rate in (rates[0], rates[-1]):
            context.notes.append(
                f"{title}: the best rate, {runs[0].rate:.1e}, is the last one tried on its side"
            )
        return runs


TRAINING_ATTACKS: dict[str, TrainingAttack] = {}  # by name, in the order of the report


def register(attack: TrainingAttack) -> TrainingAttack:
    """Makes an attack known to the audit.

    Raises:
        ValueError: Where one of that name is known already.
    """
    if attack.name in TRAINING_ATTACKS:
        raise ValueError(f"there is an attack {attack.name!r} already")
    TRAINING_ATTACKS[attack.name] = attack
    return attack
