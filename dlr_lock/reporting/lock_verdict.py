"""One verdict on a chain, from the figure that decides, in the same words wherever it is printed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

LOCKED_GAP = 0.5  # a chain whose flatten gap is below is not locked: flattening undoes it
UNDONE_RATIO = 1.05  # a student is as good as the chain when its error is at most so many times the chain's
EMPTY_ERROR = (
    0.9  # a chain whose relative error is above does little of what its MLP did; nothing at all has 1
)


class LockVerdict(StrEnum):
    """Whether a chain is a lock. The values are the words of every report."""

    EMPTY = "EMPTY"
    FLAT = "FLAT"
    UNDONE = "UNDONE"
    HELD = "locked"
    UNTRIED = "not attacked"

    @classmethod
    def of(cls, rel_error: float, gap: float, ratio: float | None) -> LockVerdict:
        """The verdict on one chain.

        Args:
            rel_error: The chain's relative error.
            gap: Its flatten gap.
            ratio: The best student's error over the chain's; None where there was no attack.
        """
        if rel_error > EMPTY_ERROR:
            return cls.EMPTY  # a student as bad as that gives no MLP back
        if gap < LOCKED_GAP:
            return cls.FLAT
        if ratio is None:
            return cls.UNTRIED
        return cls.UNDONE if ratio <= UNDONE_RATIO else cls.HELD

    @property
    def refuted(self) -> bool:
        """Whether the chain is known to be no lock."""
        return self in _REFUTED

    @property
    def locked(self) -> bool | None:
        """Whether the chain is a lock as far as was tried; None where it was not attacked."""
        return None if self is LockVerdict.UNTRIED else self is LockVerdict.HELD


_REFUTED = {
    LockVerdict.EMPTY: "the chain does little of what its MLP did, so that there is nothing to lock: train it longer, "
    "or leave the layer as it is",
    LockVerdict.FLAT: f"a flatten gap under {LOCKED_GAP}: reading the chain's input in every step gives an MLP back "
    "nearly for free",
    LockVerdict.UNDONE: "an MLP or two wide steps, fitted to the chain for the share of its training tokens in "
    "the table, are as good",
}


def error_ratio(error: float, chain_error: float) -> float:
    """A student's error over the chain's, infinite where the chain has none."""
    return error / chain_error if chain_error else math.inf


@dataclass(frozen=True, slots=True)
class Undoing:
    """What undoing a chain takes, in training tokens of a student.

    Attributes:
        tokens: After which a student is as good as the chain; where none was, the most that were tried.
        bound: Whether none was, so that it takes more.
    """

    tokens: float
    bound: bool

    @classmethod
    def of(cls, students: Iterable[tuple[int, float]]) -> Undoing | None:
        """Read off students, between two of them on the line that joins them on logarithmic axes.

        Args:
            students: (training tokens, error over the chain's) of each; of several with as many tokens the best counts.
        """
        best: dict[int, float] = {}
        for tokens, ratio in students:
            best[tokens] = min(ratio, best.get(tokens, math.inf))
        line = sorted(best.items())
        if not line:
            return None
        if line[0][1] <= UNDONE_RATIO:
            return cls(line[0][0], False)
        for (t0, a), (t1, b) in pairwise(line):
            if b <= UNDONE_RATIO:
                # What is above 1 of the ratio falls about as a power of the tokens.
                level, before, after = (max(r - 1, 1e-3) for r in (UNDONE_RATIO, a, b))
                way = math.log(before / level) / math.log(before / after) if math.isfinite(a) else 1.0
                return cls(t0 * (t1 / t0) ** way, False)
        return cls(line[-1][0], True)

    @classmethod
    def by_knowledge(
        cls, students: Iterable[tuple[str, int, float]]
    ) -> tuple[Undoing | None, Undoing | None]:
        """Of students that start from the chain's weights, and of those that know its outputs alone.

        Args:
            students: (initialisation, training tokens, error over the chain's) of each.
        """
        informed: list[tuple[int, float]] = []
        fresh: list[tuple[int, float]] = []
        for init, tokens, ratio in students:
            (fresh if init == "random" else informed).append((tokens, ratio))
        return cls.of(informed), cls.of(fresh)

    def over(self, other: Undoing | None) -> str:
        """This over the other's tokens, in a cell: '0.4', '> 1' or '< 1' where one is a bound, '-' where that says
        nothing."""
        if other is None or (self.bound and other.bound):
            return "-"
        return f"{'> ' if self.bound else '< ' if other.bound else ''}{self.tokens / other.tokens:.2g}"


def attack_words(ratio: float, cost: float | None) -> str:
    """An attack's outcome in a cell: the student's error over the chain's, and its training tokens over the
    conversion's, where these are known."""
    return f"{ratio:.2f}" + ("" if cost is None else f" at {cost:.2g}x")


def lock_words(verdict: LockVerdict, ratio: float | None, cost: float | None) -> str:
    """A chain's verdict in a cell, with the attack's outcome where there was one.

    Args:
        verdict: The verdict.
        ratio: The best student's error over the chain's; None where there was no attack.
        cost: That student's training tokens over the conversion's; None where that is not known.
    """
    return verdict.value if ratio is None else f"{verdict}, {attack_words(ratio, cost)}"


def lock_status(verdicts: Mapping[str, LockVerdict]) -> str:
    """Which converted modules are locked, which are not, and which were not attacked, a sentence each.

    Args:
        verdicts: By the modules' names.
    """
    names: dict[LockVerdict, list[str]] = {verdict: [] for verdict in LockVerdict}
    for name, verdict in verdicts.items():
        names[verdict].append(name)
    words = [
        f"NOT LOCKED, {verdict}: {', '.join(names[verdict])} ({why})."
        for verdict, why in _REFUTED.items()
        if names[verdict]
    ]

    count = len(verdicts)

    def share(verdict: LockVerdict) -> str:
        if count == 1:
            return "The one converted module"
        some = len(names[verdict])
        return (
            f"All {count} converted modules" if some == count else f"{some} of the {count} converted modules"
        )

    if names[LockVerdict.HELD]:
        words.append(f"{share(LockVerdict.HELD)} withstood the attack that was tried.")
    if untried := len(names[LockVerdict.UNTRIED]):
        verb = "was" if untried == 1 else "were"
        words.append(
            f"{share(LockVerdict.UNTRIED)} {verb} not attacked: whether a chain is locked is not known "
            "(--redistill 0.25 or an audit tells)."
        )
    return " ".join(words)
