"""One verdict on a chain, from the figure that decides, in the same words wherever it is printed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

LOCKED_GAP = 0.5  # a chain whose flatten gap is below is not locked: flattening undoes it
UNDONE_RATIO = 1.05  # what is made of a chain is as good when its error is at most so many times the chain's
# So many wide steps train like an MLP: on SmolLM2's shapes two keep 0.86 of the activations that the MLP keeps.
FEW_STEPS = 2
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

    @property
    def refuted(self) -> bool:
        """Whether the chain is known to be no lock."""
        return self in (LockVerdict.EMPTY, LockVerdict.FLAT, LockVerdict.UNDONE)

    @property
    def locked(self) -> bool | None:
        """Whether the chain is a lock as far as was tried; None where it was not attacked."""
        return None if self is LockVerdict.UNTRIED else self is LockVerdict.HELD


_EMPTY = (
    "the chain does little of what its MLP did, so that there is nothing to lock: train it longer, or leave the layer "
    "as it is"
)
_FLAT = f"a flatten gap under {LOCKED_GAP}: reading the chain's input in every step gives an MLP back nearly for free"
_UNDONE = "an MLP or two wide steps, fitted to the chain for the share of its training tokens in the table, are as good"
_MERGED = (
    "linear regression alone makes wide steps of the chain, at most two, that are as good: nothing is trained"
)


def error_ratio(error: float, chain_error: float) -> float:
    """What an attacker made of a chain, by its error over the chain's; infinite where the chain has none."""
    return error / chain_error if chain_error else math.inf


@dataclass(frozen=True, slots=True)
class Attempt:
    """What an attacker made of a chain: an MLP of its size, or at most FEW_STEPS wide steps.

    Attributes:
        ratio: Its error over the chain's, both against the chain's target.
        init: What it started from, see `convert.redistill`; "" where that is not known.
        tokens: Its training tokens; 0 where linear regression alone made it.
        share: These over those of the chain's conversion; None where that is not known.
    """

    ratio: float
    init: str
    tokens: int
    share: float | None

    @property
    def undoes(self) -> bool:
        """Whether it is as good as the chain."""
        return self.ratio <= UNDONE_RATIO

    def __str__(self) -> str:
        cost = "" if self.share is None else f" at {self.share:.2g}x"
        return f"{self.ratio:.2f}{cost if self.tokens else ' untrained'}"


def deciding(attempts: Iterable[Attempt]) -> Attempt | None:
    """The cheapest one that is as good as the chain, or else the best one; None of none."""
    made = list(attempts)
    if good := [attempt for attempt in made if attempt.undoes]:
        return min(good, key=lambda attempt: (attempt.tokens, attempt.ratio))
    return min(made, key=lambda attempt: attempt.ratio, default=None)


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on a chain, and the attempt that it is of, where there was one. As text it is a cell of a table."""

    verdict: LockVerdict
    attempt: Attempt | None

    @classmethod
    def of(cls, rel_error: float, gap: float, attempts: Iterable[Attempt]) -> Judgement:
        """The judgement on one chain.

        Args:
            rel_error: The chain's relative error.
            gap: Its flatten gap.
            attempts: All that was made of it.
        """
        attempt = deciding(attempts)
        if rel_error > EMPTY_ERROR:
            verdict = LockVerdict.EMPTY  # what is as good as that gives no MLP back
        elif gap < LOCKED_GAP:
            verdict = LockVerdict.FLAT
        elif attempt is None:
            verdict = LockVerdict.UNTRIED
        else:
            verdict = LockVerdict.UNDONE if attempt.undoes else LockVerdict.HELD
        return cls(verdict, attempt)

    @property
    def why(self) -> str:
        """Why the chain is no lock; "" where it is not known to be none."""
        if self.verdict is LockVerdict.UNDONE:
            return _UNDONE if self.attempt and self.attempt.tokens else _MERGED
        return {LockVerdict.EMPTY: _EMPTY, LockVerdict.FLAT: _FLAT}.get(self.verdict, "")

    def __str__(self) -> str:
        return self.verdict.value if self.attempt is None else f"{self.verdict}, {self.attempt}"


@dataclass(frozen=True, slots=True)
class Undoing:
    """What undoing a chain takes, in training tokens, or over what something else takes: from `least` to `most`.

    As text it is a cell: '0.4', 'at most 0.062', 'more than 1', or '-' where nothing is known.

    Attributes:
        least: 0 where the first that was tried sufficed already.
        most: Infinite where nothing that was tried sufficed.
    """

    least: float = 0.0
    most: float = math.inf

    @classmethod
    def of(cls, attempts: Iterable[Attempt]) -> Undoing:
        """Read off attempts, between two of them on the line that joins them on logarithmic axes.

        Args:
            attempts: In any order; of several with as many training tokens the best counts.
        """
        best: dict[int, float] = {}
        for attempt in attempts:
            best[attempt.tokens] = min(attempt.ratio, best.get(attempt.tokens, math.inf))
        fewer, above = 0, math.inf
        for tokens, ratio in sorted(best.items()):
            if ratio <= UNDONE_RATIO:
                if not fewer:
                    return cls(0.0, tokens)
                # What is above 1 of the ratio falls about as a power of the tokens.
                level, before, after = (max(r - 1, 1e-3) for r in (UNDONE_RATIO, above, ratio))
                way = math.log(before / level) / math.log(before / after) if math.isfinite(above) else 1.0
                found = fewer * (tokens / fewer) ** way
                return cls(found, found)
            fewer, above = tokens, ratio
        return cls(fewer)

    def over(self, other: Undoing) -> Undoing:
        """This over the other, which is more than 0."""
        most = self.most and (self.most / other.least if other.least else math.inf)
        return Undoing(self.least / other.most, most)

    def __str__(self) -> str:
        if self.least == self.most:
            return f"{self.least:.2g}"
        if math.isfinite(self.most):
            return f"at most {self.most:.2g}"
        return f"more than {self.least:.2g}" if self.least else "-"

    def to_dict(self) -> dict[str, float | None]:
        """The fields by name, fit for JSON: infinity is None."""
        return {"least": self.least, "most": self.most if math.isfinite(self.most) else None}


def undoing_figures(attempts: Iterable[Attempt], conversion: float | None) -> dict[str, Undoing]:
    """The two figures of every report, by their names in data: what undoing takes who starts from the chain's weights,
    over its conversion, and over what it takes who knows its outputs alone.

    Args:
        attempts: All that was made of the chain.
        conversion: Training tokens of its conversion; None where these are not known.
    """
    made = list(attempts)
    informed = Undoing.of(attempt for attempt in made if attempt.init != "random")
    fresh = Undoing.of(attempt for attempt in made if attempt.init == "random")
    whole = Undoing(conversion, conversion) if conversion else Undoing()
    return {"undoing_over_conversion": informed.over(whole), "undoing_over_fresh": informed.over(fresh)}


@dataclass(frozen=True, slots=True)
class Redistillation:
    """The attack on one module's chain: students, MLPs of its size or two wide steps, fitted to it.

    Errors are against what the chain was fitted to, at the x that the chain gets, on held-out tokens.

    Attributes:
        train_tokens: Training tokens that the attacker spent on each student.
        conversion: Those that the chain cost.
        error: The best student's relative error, as in `convert.evaluate.Fidelity`.
        chain_error: The chain's own.
        student_error: The best student's against the chain's outputs.
        init: What it started from; "" where an older program did not say.
        errors: Every student's, by what it started from; empty where an older program did not say.
        merged_error: That of the chain's steps merged into two by linear regression, with nothing trained; None where
            that was not measured.
    """

    train_tokens: int
    conversion: int
    error: float
    chain_error: float
    student_error: float
    init: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    merged_error: float | None = None

    @property
    def ratio(self) -> float:
        """The best student's error over the chain's."""
        return error_ratio(self.error, self.chain_error)

    @property
    def attempts(self) -> list[Attempt]:
        """All that was made of the chain."""
        made = [
            Attempt(error_ratio(error, self.chain_error), init, self.train_tokens, self.cost)
            for init, error in (self.errors or {self.init: self.error}).items()
        ]
        if self.merged_error is not None:
            made.append(Attempt(error_ratio(self.merged_error, self.chain_error), "linear", 0, 0.0))
        return made

    @property
    def undone(self) -> bool:
        """Whether any of that is as good as the chain."""
        return any(attempt.undoes for attempt in self.attempts)

    @property
    def cost(self) -> float:
        """The attacker's training tokens as a share of the conversion's."""
        return self.train_tokens / self.conversion

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, and what follows from them."""
        figures = undoing_figures(self.attempts, self.conversion)
        follows = {name: figure.to_dict() for name, figure in figures.items()}
        return {**asdict(self), "undone": self.undone, "cost": self.cost, **follows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Redistillation:
        """The inverse of `to_dict`, also of what an older program wrote."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def __str__(self) -> str:
        return f"{'undone' if self.undone else 'not undone'}, {deciding(self.attempts)}"


def lock_status(judgements: Mapping[str, Judgement]) -> str:
    """Which converted modules are locked, which are not, and which were not attacked, a sentence each.

    Args:
        judgements: By the modules' names.
    """
    refuted: dict[str, list[str]] = {why: [] for why in (_EMPTY, _FLAT, _UNDONE, _MERGED)}
    for name, judgement in judgements.items():
        if judgement.why:
            refuted[judgement.why].append(name)
    words = [
        f"NOT LOCKED, {judgements[names[0]].verdict}: {', '.join(names)} ({why})."
        for why, names in refuted.items()
        if names
    ]
    count = len(judgements)
    verdicts = Counter(judgement.verdict for judgement in judgements.values())

    def share(verdict: LockVerdict) -> str:
        if count == 1:
            return "The one converted module"
        some = verdicts[verdict]
        return (
            f"All {count} converted modules" if some == count else f"{some} of the {count} converted modules"
        )

    if verdicts[LockVerdict.HELD]:
        words.append(f"{share(LockVerdict.HELD)} withstood the attack that was tried.")
    if untried := verdicts[LockVerdict.UNTRIED]:
        verb = "was" if untried == 1 else "were"
        words.append(
            f"{share(LockVerdict.UNTRIED)} {verb} not attacked: whether a chain is locked is not known "
            "(--redistill 0.25 or an audit tells)."
        )
    return " ".join(words)
