"""What the lock costs in its owner's words: a fine-tune, undoing the lock first, and how many fine-tunes pay for that.

Everything is read off the rows of a report: the curves of runs, the costs of steps, and those of redistillation. A
fine-tune here is one that reaches SHARE of the original's best gain.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil

from ..reporting.words import flops_words, seconds_words
from .report import AttackerCost, AuditReport, OwnersPrice, StepCost, Structural, cheapest_step
from .verdict import LOCKED, ORIGINAL, SHARES, Curve, mean_curves, target_losses, tune_cost

SHARE = max(SHARES)
STANDARD, CAREFUL, EXPERT, OWNER = "standard tooling", "careful engineer", "expert", "with the original"
ATTACKERS = (STANDARD, CAREFUL, EXPERT, OWNER)
TUNES = (1, 3, 10, 30, 100, 300, 1000)  # fine-tunes, of the table and the picture
PRICED = ("flops", "seconds")
_ANY = "any way through the chains"

Curves = Mapping[tuple[str, str], Curve]  # by variant and attack, see `mean_curves`
Choice = Callable[[list[StepCost], str], StepCost | None]  # of one model and attack, by a measure


def owners_price(report: AuditReport) -> OwnersPrice | None:
    """The price of the lock; None where the original gained nothing, or no step was measured.

    Args:
        report: Its runs, steps, structural rows and machine are read.
    """
    curves = mean_curves(report.runs)
    loss = target_losses(report.runs, curves).get(SHARE)
    if loss is None:
        return None
    found = [a for measure in PRICED for a in _attackers(report, curves, loss, measure)]
    through, experts, owners = (_of(found, who) for who in (_ANY, EXPERT, OWNER))
    known = [m for m in PRICED if m in owners and (m in through or m in experts) and not owners[m][0].bound]
    if "flops" not in known:
        return None
    first = {m: cheapest([*through.get(m, []), *experts.get(m, [])], 1) for m in known}
    base = {m: owners[m][0] for m in known}
    undone = {m: _undoing(through.get(m, []), experts.get(m, [])) for m in known}
    lost = all(way.bound for way in through.get("flops", []))
    words = [_tune_words(first, base), *_undo_words(report, undone, base, lost)]
    return OwnersPrice(
        words,
        SHARE,
        first["flops"].total(1) / base["flops"].each,
        first["flops"].bound,
        {m: None if pair is None else pair[1] for m, pair in undone.items()},
        [a for a in found if a.who != _ANY],
    )


def cheapest(attackers: Iterable[AttackerCost], tunes: int) -> AttackerCost:
    """Who pays least for so many fine-tunes: among those who reached the gain, or else among those who did not."""
    return min(attackers, key=lambda a: (a.bound, a.total(tunes)))


def break_even(undone: AttackerCost, through: AttackerCost) -> int | None:
    """From how many fine-tunes on it is cheaper to undo the lock first; None where it never is.

    Who reached the gain comes before who did not, as in `cheapest`.
    """
    if undone.bound or through.bound:
        return None if undone.bound else 1
    saved = through.each - undone.each
    return max(1, ceil(undone.first / saved)) if saved > 0 else None


def _attackers(report: AuditReport, curves: Curves, loss: float, measure: str) -> list[AttackerCost]:
    """Each attacker's cheapest way in a measure, the expert's for every variant that was redistilled."""
    undone = {row.name: row for row in report.structural if getattr(row, measure)}
    ways: list[tuple[str, str, Choice]] = [
        (_ANY, LOCKED, cheapest_of),
        (STANDARD, LOCKED, plain_step),
        (CAREFUL, LOCKED, _frugal(report.steps)),
        *((EXPERT, name, cheapest_of) for name in undone),
        (OWNER, ORIGINAL, cheapest_of),
    ]
    found = []
    for who, variant, choice in ways:
        costs = _costs(curves, report.steps, who, variant, choice, undone.get(variant), measure, loss)
        found += [cheapest(costs, 1)] if costs else []
    return found


def _costs(
    curves: Curves,
    steps: Sequence[StepCost],
    who: str,
    variant: str,
    choice: Choice,
    undone: Structural | None,
    measure: str,
    loss: float,
) -> list[AttackerCost]:
    """What a fine-tune of one model costs by each attack."""
    found = []
    for (of, attack), curve in curves.items():
        row = choice([s for s in steps if (s.variant, s.attack) == (of, attack)], measure)
        if of != variant or row is None:
            continue
        each, tokens, bound = tune_cost(curve, row, measure, loss)
        first = float(getattr(undone, measure) or 0) if undone else 0.0
        name = f"{variant}, {attack}"
        found.append(AttackerCost(who, measure, name, row.strategy, tokens, first, each, row.peak, bound))
    return found


def cheapest_of(rows: list[StepCost], measure: str) -> StepCost | None:
    """The step of the cheapest strategy."""
    return cheapest_step(rows, rows[0].variant, rows[0].attack, measure) if rows else None


def plain_step(rows: list[StepCost], measure: str) -> StepCost | None:
    """The step by plain autograd, which is the first one; None where an attack has none, or it lacks the measure."""
    plain = [s for s in rows[:1] if s.strategy.rpartition(", ")[2] == "plain"]
    return cheapest_of(plain, measure)


def _frugal(steps: Sequence[StepCost]) -> Choice:
    """The cheapest step among those that fit in the memory of the original's plain one for the same attack; where none
    does, the one that takes the least memory."""

    def choice(rows: list[StepCost], measure: str) -> StepCost | None:
        if not rows:
            return None
        plain = plain_step([s for s in steps if (s.variant, s.attack) == (ORIGINAL, rows[0].attack)], "peak")
        fit = [s for s in rows if plain is not None and s.peak <= plain.peak]
        return cheapest_of(fit or [min(rows, key=lambda s: s.peak)], measure)

    return choice


def _of(found: Iterable[AttackerCost], who: str) -> dict[str, list[AttackerCost]]:
    """One attacker's ways by measure."""
    ways: dict[str, list[AttackerCost]] = {}
    for way in found:
        if way.who == who:
            ways.setdefault(way.measure, []).append(way)
    return ways


def _undoing(
    through: list[AttackerCost], experts: list[AttackerCost]
) -> tuple[AttackerCost, int | None] | None:
    """The way of undoing the lock that pays the soonest, and from how many fine-tunes on; where none ever pays, the one
    with the cheapest fine-tunes. None where nothing was undone."""
    if not experts:
        return None
    best = cheapest(through, 1) if through else None
    pays = [(1 if best is None else break_even(way, best), way) for way in experts]
    sooner = [(n, way) for n, way in pays if n is not None]
    if sooner:
        n, way = min(sooner, key=lambda pair: (pair[0], pair[1].total(pair[0])))
        return way, n
    return min(experts, key=lambda way: (way.bound, way.each)), None


def _tune_words(first: dict[str, AttackerCost], base: dict[str, AttackerCost]) -> str:
    ours, theirs = first["flops"], base["flops"]
    words = (
        f"A fine-tune of {theirs.tokens:,.0f} tokens, to {SHARE:.0%} of the original's best gain, costs "
        f"{_times(ours, theirs)} as much on this model as on the original ({flops_words(ours.total(1))} against "
        f"{flops_words(theirs.each)}), by the cheapest attack we know ('{ours.attack}'"
        f"{', undoing the lock included' if ours.first else ''})"
    )
    if "seconds" in first:
        of_seconds = first["seconds"]
        by = "" if of_seconds.attack == ours.attack else f" ('{of_seconds.attack}')"
        words += f"; in seconds, {_times(of_seconds, base['seconds'])}{by}"
    if ours.bound:
        words += "; no attack reached that gain within the budget, so that this is a lower bound"
    return f"{words}."


def _times(ours: AttackerCost, theirs: AttackerCost) -> str:
    return f"{'more than ' if ours.bound else ''}{ours.total(1) / theirs.each:.3g} times"


def _undo_words(
    report: AuditReport,
    undone: dict[str, tuple[AttackerCost, int | None] | None],
    base: dict[str, AttackerCost],
    lost: bool,
) -> list[str]:
    """What undoing the lock costs, and from when it pays. lost: whether nothing reached the gain through the chains."""
    if (pair := undone["flops"]) is None:
        why = (
            "none of the attacks is tried on what undoing leaves"
            if report.modules
            else "no chain was distilled back"
        )
        return [f"What an attacker pays who first undoes the lock is not known: {why}."]
    way, pays = pair
    variant = way.attack.rpartition(", ")[0]
    row = next(row for row in report.structural if row.name == variant)
    where = report.machine.get("device")
    took = (
        "" if row.seconds is None else f", {seconds_words(row.seconds)}{f' on one {where}' if where else ''}"
    )
    words = (
        f"An attacker who first undoes the lock ('{variant}') pays {flops_words(way.first)}{took}, once: as much as "
        f"{way.first / base['flops'].each:,.3g} fine-tunes of the original"
    )
    if way.bound:
        return [
            f"{words}. No fine-tune of what that leaves reached the gain within the budget: from how many fine-tunes "
            "on it pays, if ever, is not known, and its price here is a lower bound."
        ]
    words += f"; then {way.each / base['flops'].each:.3g} times the original's price a fine-tune."
    if pays is None:
        return [f"{words} That never pays: training through the chains is no dearer."]
    later = undone.get("seconds")
    in_seconds = f", in seconds from {later[1]:,} on" if later and later[1] is not None else ""
    if lost:
        return [f"{words} Nothing else reached the gain within the budget."]
    if pays == 1:
        return [f"{words} Undoing first is the cheapest for a single fine-tune already{in_seconds}."]
    return [f"{words} From {pays:,} fine-tunes on, undoing first is the cheapest{in_seconds}."]
