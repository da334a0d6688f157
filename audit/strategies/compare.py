"""Locked against original, each with its own best strategy: the one that an attacker takes for what is scarce."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...common.errors import DLRError
from .slot import Row

MEASURES = ("memory", "held", "flops", "launches", "dependent", "seconds")


@dataclass(frozen=True, slots=True)
class Objective:
    """The least of one measure, within limits of others: multiples of what the original's plain step of the same trainable
    takes. Measures are bytes of memory at the peak, bytes held between forward and backward, FLOPs, launches, dependent
    launches and seconds of a whole step. Raises DLRError on another."""

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
    """Of one trainable: the two rows that serve the objective best, None where none meets its limits or was so measured."""

    trainable: str
    objective: Objective
    locked: Row | None
    original: Row | None
    ratio: float | None


def compare(
    locked: Iterable[Row],
    original: Iterable[Row],
    *,
    layers: int = 1,
    objectives: Sequence[Objective] = OBJECTIVES,
) -> list[Comparison]:
    """Every objective for every trainable of the original's rows. layers: of how many such slots the memory counts, see
    `Row.memory`."""
    locked, original, table = list(locked), list(original), []
    for trainable in dict.fromkeys(row.trainable for row in original):
        ours, theirs = ([r for r in rows if r.trainable == trainable] for rows in (locked, original))
        for objective in objectives:
            a, b = (best(rows, objective, theirs[0], layers=layers) for rows in (ours, theirs))
            ratio = None
            if a is not None and b is not None:
                ratio = _known(a, objective.minimise, layers) / _known(b, objective.minimise, layers)
            table.append(Comparison(trainable, objective, a, b, ratio))
    return table


def best(
    rows: Iterable[Row], objective: Objective, base: Row | None = None, *, layers: int = 1
) -> Row | None:
    """The row that serves the objective best, None where none does. base: what its limits are multiples of."""
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


def measured(row: Row, measure: str, layers: int = 1) -> float | None:
    """One of MEASURES of a row; None where it was not measured."""
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


def _known(row: Row | None, measure: str, layers: int) -> float:
    value = None if row is None else measured(row, measure, layers)
    if value is None:
        raise DLRError(f"a limit on {measure} wants a plain step that was measured by it")
    return value
