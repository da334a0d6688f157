"""What an audit found, as plain data: each attack a row, and the verdicts that are read off the rows."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ..convert.evaluate import Evaluation, StateEvaluation, distance_of
from .asymmetry import Asymmetry

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Structural:
    """One attack on the chains' structure, on all locked modules at once, and the model that it leaves.

    name: such as 'flatten'. about: what is done, a sentence. evaluation: the attacked model against the original on
    held-out neutral text. train_tokens: the attacker's training tokens a module; flops, seconds: all that the attack took
    (None: nothing but reading the weights).
    slots: what is in the chains' places afterwards: 'MLP', of one wide step, or 'chain'.
    """

    name: str
    about: str
    evaluation: Evaluation | StateEvaluation
    slots: str
    train_tokens: int = 0
    flops: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Student:
    """One module distilled back into an MLP of its size for `train_tokens` training tokens.

    init: 'linear' (see convert.unlock), or 'random': a fresh SwiGLU MLP. share: train_tokens over those of the
    module's conversion, None where the checkpoint does not say. error: relative error against the original MLP on
    held-out tokens of the original's activations; student_error: against the chain, on the locked model's.
    """

    init: str
    train_tokens: int
    share: float | None
    error: float
    student_error: float
    seconds: float


@dataclass(frozen=True, slots=True)
class ModuleStudents:
    """All students of one module. chain_error: the chain's own relative error, measured as `Student.error`. gap: the
    flatten gap over |chain|^2, on the locked model's own activations."""

    module: str
    chain: str
    chain_error: float
    gap: float
    students: list[Student]

    def undone(self, tolerance: float) -> Student | None:
        """The cheapest copy whose error is at most `tolerance` times the chain's own; None where none is."""
        good = [copy for copy in self.students if copy.error <= tolerance * self.chain_error]
        return min(good, key=lambda copy: copy.train_tokens, default=None)


@dataclass(frozen=True, slots=True)
class Run:
    """One fine-tuning, and the held-out loss of the task, in nats a token, after so many training tokens.

    variant: 'original', 'locked', or such as 're-distilled, 0.25': of the conversion's train_tokens. attack: 'full', 'LoRA',
    'attention' (LoRA on all but the MLPs' places) or 'MeZO'.
    neutral: loss on neutral text before and after. diverged: the loss became no number, and the curve ends before that.
    seconds: of a training step of `batch` tokens, the median. best: its rate is the best one of the sweep.
    """

    variant: str
    attack: str
    rate: float
    seed: int
    batch: int
    tokens: list[int]
    losses: list[float]
    neutral: tuple[float, float | None]
    seconds: float
    diverged: bool = False
    best: bool = False


@dataclass(frozen=True, slots=True)
class StepCost:
    """A training step of an variant's whole model for an attack, by one strategy. flops, launches, dependent: of a step of
    `tokens` tokens; peak, held: bytes, parameters and the optimizer's state left out; seconds: None, not timed."""

    variant: str
    attack: str
    strategy: str
    tokens: int
    flops: int
    peak: int
    held: int
    launches: int
    dependent: int
    seconds: float | None = None


def cheapest_step(steps: Iterable[StepCost], variant: str, attack: str, measure: str) -> StepCost | None:
    """The step of the strategy that is cheapest by a measure ('flops', 'seconds', 'peak'); None where none has it."""
    measured = [
        s for s in steps if (s.variant, s.attack) == (variant, attack) and getattr(s, measure) is not None
    ]
    return min(measured, key=lambda s: getattr(s, measure), default=None)


@dataclass(frozen=True, slots=True)
class Price:
    """attack: 'variant, attack'. strategy: how its steps are trained. cost: in the verdict's measure. bound: the target was
    not reached, and the cost is that of the whole budget: it takes more."""

    attack: str
    strategy: str
    cost: float
    bound: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target and one measure. share: the gain to reach, over the best one of the original within the budget.
    measure: 'flops', 'seconds' or 'peak' (bytes). tunes: fine-tunes that one redistillation serves. ratio: locked over
    original, None where one has no price; bound: it is more than that."""

    share: float
    loss: float
    measure: str
    tunes: int
    locked: Price | None
    original: Price | None
    ratio: float | None
    bound: bool


@dataclass(frozen=True, slots=True)
class AuditReport:
    """One audit of `locked` against `original`. options: every choice. fidelity: the locked model against the
    original on held-out neutral text. slot: what the asymmetries are of. notes: what was not run, and why; what the
    owner should know."""

    locked: str
    original: str
    options: dict[str, Any]
    machine: dict[str, Any]
    threat: str
    fidelity: Evaluation | StateEvaluation
    structural: list[Structural]
    modules: list[ModuleStudents]
    runs: list[Run]
    steps: list[StepCost]
    asymmetries: list[Asymmetry]
    verdicts: list[Verdict]
    attacks: dict[str, str] = field(default_factory=dict)
    slot: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def recovers(self, row: Structural) -> float:
        """Distance to the original that the attack leaves, over the locked model's own: at 1 or less, with MLPs in
        the chains' places, it is a way around the lock."""
        own = distance_of(self.fidelity)
        return distance_of(row.evaluation) / own if own else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {"schema": SCHEMA} | _plain(asdict(self))


def structural_from(values: dict[str, Any]) -> Structural:
    """The row that `asdict` gave these values of."""
    kind = StateEvaluation if "state_error" in values["evaluation"] else Evaluation
    return Structural(**values | {"evaluation": kind(**values["evaluation"])})


def _plain(value: Any) -> Any:
    """Without infinity, which JSON has not (a perplexity can be beyond every float)."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
