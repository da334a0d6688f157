"""What an audit found, as plain data: each attack a row, and the verdicts that are read off the rows."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ..convert.evaluate import Evaluation, StateEvaluation, distance_of
from ..reporting.lock_verdict import FEW_STEPS, Attempt, Judgement, Undoing, error_ratio, undoing_figures
from .asymmetry import Asymmetry, DepthCost

SCHEMA = 2  # 1: of 0.1, with other names


@dataclass(frozen=True, slots=True)
class Structural:
    """One attack on the chains' structure, on all locked modules at once, and the model that it leaves.

    Attributes:
        name: Such as 'flatten'.
        about: What is done, a sentence.
        evaluation: The attacked model against the original on held-out neutral text.
        slots: What is in the chains' places afterwards: 'MLP', of one wide step, 'two steps' or 'chain'.
        train_tokens: The attacker's training tokens a module.
        flops, seconds: All that the attack took; None where it does no more than read the weights.
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
    """One module distilled back into an MLP of its size, or two wide steps.

    Attributes:
        init: What it started from, see `convert.redistill`.
        train_tokens: Training tokens of the distillation.
        share: These over those of the module's conversion; None where the checkpoint does not say.
        error: Relative error against what the chain was fitted to (`attacks.redistillation.chain_targets`), held out.
        student_error: Relative error against the chain, on held-out tokens of the locked model's activations.
        seconds: Of the distillation and of getting the activations.
        distance: Of the locked model with this student alone in its chain's place to the locked model, see
            `convert.evaluate.distance_of`, on held-out text.
    """

    init: str
    train_tokens: int
    share: float | None
    error: float
    student_error: float
    seconds: float
    distance: float


@dataclass(frozen=True, slots=True)
class Merge:
    """A chain as fewer, wider steps, whose reading directions linear regression gives: nothing is trained.

    Attributes:
        steps: Of a lane.
        error: Relative error, measured as `Student.error`.
    """

    steps: int
    error: float


@dataclass(frozen=True, slots=True)
class GradientError:
    """How far a gradient through locked layers is from the original's.

    Attributes:
        name: Of a module whose chain and MLP are compared by their products with random cotangents, or of weights.
        error: |ours - theirs|^2 / |theirs|^2, of a module the mean over tokens, where one counts for 1 at most.
        cosine: Between the two, of a module the mean over tokens.
        tokens: Of held-out neutral text.
        value_error: The chain's relative error against the MLP there, of a module; None of weights.
    """

    name: str
    error: float
    cosine: float
    tokens: int
    value_error: float | None = None


@dataclass(frozen=True, slots=True)
class ModuleStudents:
    """All students of one module.

    Attributes:
        module: The module's name.
        chain: The chain's form, in words.
        chain_error: The chain's own relative error, measured as `Student.error`.
        gap: The flatten gap over |chain|^2, on the locked model's own activations.
        students: In ascending order of their training tokens.
        merges: In ascending order of their steps, up to the first that is as good as the chain; the chain itself is the
            last where no shorter one is.
    """

    module: str
    chain: str
    chain_error: float
    gap: float
    students: list[Student]
    merges: list[Merge]

    def ratio(self, made: Student | Merge) -> float:
        """The error of what an attacker made of the chain, over the chain's."""
        return error_ratio(made.error, self.chain_error)

    @property
    def attempts(self) -> list[Attempt]:
        """All that was made of the chain and trains like an MLP: the students, and the chains of few wide steps."""
        made = [Attempt(self.ratio(s), s.init, s.train_tokens, s.share) for s in self.students]
        return made + [Attempt(self.ratio(m), "linear", 0, 0.0) for m in self.merges if m.steps <= FEW_STEPS]

    @property
    def judgement(self) -> Judgement:
        """Whether the chain is a lock, and by what."""
        return Judgement.of(self.chain_error, self.gap, self.attempts)

    @property
    def undoing(self) -> dict[str, Undoing]:
        """What undoing the chain takes, see `undoing_figures`."""
        conversion = next((s.train_tokens / s.share for s in self.students if s.share), None)
        return undoing_figures(self.attempts, conversion)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, and what follows from them."""
        undoing = {name: figure.to_dict() for name, figure in self.undoing.items()}
        return asdict(self) | {"verdict": self.judgement.verdict.value} | undoing


@dataclass(frozen=True, slots=True)
class Run:
    """One fine-tuning run of one model.

    Attributes:
        variant: 'original', 'locked', or such as 'redistilled, 0.25': that share of the conversion's training tokens.
        attack: The name of an attack on training.
        rate: The learning rate at its full height.
        seed: Of the order of the text and of all that the attack draws.
        batch: Tokens of a step.
        tokens: Training tokens after which the held-out loss was measured; the first is 0.
        losses: The held-out loss of the task then, in nats a token.
        neutral: The loss on neutral text before and after; None for after where the run diverged or was given up.
        seconds: Of a training step, the median.
        diverged: Whether the loss became no number; the curve ends before that.
        best: Whether the rate is the best one of the sweep.
        given_up: Whether the run ended early, plainly behind one at another rate.
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
    given_up: bool = False


@dataclass(frozen=True, slots=True)
class StepCost:
    """A training step of a variant's whole model for an attack, by one strategy.

    Attributes:
        variant, attack: As in `Run`.
        strategy: The strategy's name.
        tokens: Of the step.
        flops, launches, dependent: See `meters.Counts`; forward and backward.
        peak, held: Bytes, see `meters.StepCounts`; parameters and the optimizer's state are left out.
        seconds: None where it was not timed.
    """

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
    """The step of the strategy that is cheapest by a measure, such as 'flops' or 'seconds'; None where none has it."""
    measured = [
        s for s in steps if (s.variant, s.attack) == (variant, attack) and getattr(s, measure) is not None
    ]
    return min(measured, key=lambda s: getattr(s, measure), default=None)


@dataclass(frozen=True, slots=True)
class Price:
    """What an attack takes to reach a target.

    Attributes:
        attack: "variant, attack".
        strategy: How its steps are trained.
        cost: In the verdict's measure.
        bound: Whether the target was not reached: the cost is that of the whole budget, and it takes more.
    """

    attack: str
    strategy: str
    cost: float
    bound: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target and one measure.

    Attributes:
        share: The gain to reach, over the best one of the original within the budget.
        loss: The held-out loss that this is, in nats a token.
        measure: 'flops', 'seconds' or 'peak' (bytes).
        tunes: How many fine-tunes one redistillation serves.
        locked, original: The cheapest attack on each; None where none has a price.
        ratio: Locked over original; None where one of them has no price.
        bound: Whether the ratio is more than that.
    """

    share: float
    loss: float
    measure: str
    tunes: int
    locked: Price | None
    original: Price | None
    ratio: float | None
    bound: bool


@dataclass(frozen=True, slots=True)
class AttackerCost:
    """What fine-tunes of equal gain cost one kind of attacker, who does something once and then fine-tunes.

    Attributes:
        who: One of `price.ATTACKERS`.
        measure: 'flops' or 'seconds'.
        attack: "variant, attack".
        strategy: How the steps are trained.
        tokens: Training tokens of a fine-tune.
        first: Cost before the first fine-tune: of undoing the lock; 0 where nothing is undone.
        each: Cost of a fine-tune.
        peak: Bytes of activations and gradients of a step, at the peak.
        bound: Whether the gain was not reached: `tokens` and `each` are the whole budget's, and it takes more.
    """

    who: str
    measure: str
    attack: str
    strategy: str
    tokens: float
    first: float
    each: float
    peak: int
    bound: bool

    def total(self, tunes: int) -> float:
        """The cost of so many fine-tunes."""
        return self.first + tunes * self.each


@dataclass(frozen=True, slots=True)
class OwnersPrice:
    """The lock in its owner's words.

    Attributes:
        words: What a fine-tune costs, what undoing the lock costs, and when that pays: a sentence or two each.
        share: Of the original's best gain, that every fine-tune here reaches.
        ratio: FLOPs of one fine-tune by the cheapest attack, undoing included where it undoes, over the original's.
        bound: Whether the ratio is more than that.
        break_even: By measure, the number of fine-tunes from which undoing the lock first is the cheapest; None where
            it never is, as far as was measured.
        attackers: What fine-tunes cost whom, in each measure. The expert may undo the lock more or less thoroughly,
            and takes what is cheapest for the number of fine-tunes.
    """

    words: list[str]
    share: float
    ratio: float
    bound: bool
    break_even: dict[str, int | None]
    attackers: list[AttackerCost]


@dataclass(frozen=True, slots=True)
class AuditReport:
    """One audit of a locked model against its original.

    Attributes:
        locked, original: The models' names; no path of the machine's is in them.
        options: Every choice.
        machine: Where it was run, see `common.machine`.
        threat: The threat model, in words.
        fidelity: The locked model against the original on held-out neutral text.
        structural: Attacks that train nothing end to end.
        modules: Redistillation, module by module.
        runs: Every fine-tuning run.
        steps: What a training step costs, by every strategy.
        asymmetries: Backward over forward of one slot, locked over original.
        verdicts: What is read off the rows.
        price: The same in an owner's words; None where the original gained nothing, or nothing was fine-tuned.
        gradients: How wrong gradients through the chains are: of each module, of all other weights, and by layer.
        depths: What plain autograd takes in one slot, by the chain's depth.
        attacks: The attacks on training that were chosen: name -> what it does, a sentence.
        slot: What the asymmetries are of.
        notes: What was not run, and why; what else the owner should know.
        seconds: That the audit took, earlier runs of an interrupted one up to their last finished parts.
    """

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
    price: OwnersPrice | None = None
    gradients: list[GradientError] = field(default_factory=list)
    depths: list[DepthCost] = field(default_factory=list)
    attacks: dict[str, str] = field(default_factory=dict)
    slot: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def recovers(self, row: Structural) -> float:
        """Distance to the original that the attack leaves, over the locked model's own: at 1 or less, with MLPs or
        two wide steps in the chains' places, it is a way around the lock."""
        own = distance_of(self.fidelity)
        return distance_of(row.evaluation) / own if own else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; the price comes first, as in every form of the report."""
        values = asdict(self) | {"modules": [module.to_dict() for module in self.modules]}
        return {"schema": SCHEMA, "price": None} | _finite(values)


def structural_from(values: dict[str, Any]) -> Structural:
    """The row that `asdict` gave these values of."""
    kind = StateEvaluation if "state_error" in values["evaluation"] else Evaluation
    return Structural(**values | {"evaluation": kind(**values["evaluation"])})


def _finite(value: Any) -> Any:
    """Without infinity, which JSON has not (a perplexity can be beyond every float)."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
