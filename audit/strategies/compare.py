"""Locked against original, each with its own best strategy: the one that an attacker takes for what is scarce."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...common.errors import DLRError
from .slot import StrategyCost

MEASURES = ("memory", "held", "flops", "launches", "dependent", "seconds")


@dataclass(frozen=True, slots=True)
class Objective:
    """What an attacker has least of, within limits.

    Measures are bytes of memory at the peak, bytes held between forward and backward, FLOPs, launches, dependent
    launches and seconds of a whole step.

    Attributes:
        minimise: The measure of which a step shall take the least.
        limits: By measure, multiples of what the original's plain step takes that trains the same.

    Raises:
        DLRError: On a measure that there is not.
    """

    minimise: str
    limits: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for measure in (self.minimise, *self.limits):
            if measure not in MEASURES:
                raise DLRError(f"no measure {measure!r}; one of {', '.join(MEASURES)}")

    def __str__(self) -> str:
        limits = (f"{limit:.3g} x {measure}" for measure, limit in self.limits.items())
        return " at ".join([f"least {self.minimise}", *limits])


# The limits on FLOPs let through what plain training costs, one inversion, and one checkpoint; 2% more than each, for
# adapters and Gram blocks.
OBJECTIVES = (
    Objective("memory", {"flops": 1.02}),
    Objective("memory", {"flops": 1.02 * 7 / 6}),
    Objective("memory", {"flops": 1.02 * 4 / 3}),
    Objective("memory"),
    Objective("flops", {"memory": 1.0}),
    Objective("flops"),
    Objective("dependent"),
    Objective("seconds"),
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both sides' best strategies for one objective.

    Attributes:
        trainable: What both train.
        objective: What they are the best for.
        locked, original: Their costs; None where none meets the limits, or was so measured.
        ratio: Locked over original in the measure that is minimised; None where one is missing.
    """

    trainable: str
    objective: Objective
    locked: StrategyCost | None
    original: StrategyCost | None
    ratio: float | None


def compare_best(
    locked: Iterable[StrategyCost],
    original: Iterable[StrategyCost],
    *,
    layers: int = 1,
    objectives: Sequence[Objective] = OBJECTIVES,
) -> list[Comparison]:
    """Compares both sides by every objective, for everything that the original's strategies train.

    Args:
        locked, original: The costs of either side's strategies, the plain one first.
        layers: Of how many such slots the memory counts, see `StrategyCost.memory`.
        objectives: What to compare by.

    Raises:
        DLRError: Where a limit is on a measure that the original's plain step lacks.
    """
    locked, original, table = list(locked), list(original), []
    for trainable in dict.fromkeys(row.trainable for row in original):
        ours, theirs = ([r for r in rows if r.trainable == trainable] for rows in (locked, original))
        for objective in objectives:
            a, b = (best_cost(rows, objective, theirs[0], layers=layers) for rows in (ours, theirs))
            ratio = None
            if a is not None and b is not None:
                ratio = _known(a, objective.minimise, layers) / _known(b, objective.minimise, layers)
            table.append(Comparison(trainable, objective, a, b, ratio))
    return table


def best_cost(
    rows: Iterable[StrategyCost], objective: Objective, base: StrategyCost | None = None, *, layers: int = 1
) -> StrategyCost | None:
    """The cost that serves the objective best, None where none does. base: what its limits are multiples of."""
    limits = {m: limit * _known(base, m, layers) for m, limit in objective.limits.items()}
    found = [
        row
        for row in rows
        if all(
            (value := measured(row, m, layers)) is not None and value <= most for m, most in limits.items()
        )
        and measured(row, objective.minimise, layers) is not None
    ]
    return min(found, key=lambda row: _known(row, objective.minimise, layers), default=None)


def measured(row: StrategyCost, measure: str, layers: int = 1) -> float | None:
    """One of MEASURES of a cost; None where it was not measured."""
    if measure == "seconds":
        return None if row.seconds is None else row.seconds.step
    if row.counts is None:
        return None
    values = {
        "memory": row.memory(layers),
        "held": row.counts.held,
        "flops": row.counts.flops,
        "launches": row.counts.forward.launches + row.counts.backward.launches,
        "dependent": row.counts.dependent,
    }
    return values[measure]


def _known(row: StrategyCost | None, measure: str, layers: int) -> float:
    value = None if row is None else measured(row, measure, layers)
    if value is None:
        raise DLRError(f"a limit on {measure} wants a plain step that was measured by it")
    return value
