"""An audit as sections: for the page, for the terminal, and in sentences for whoever reads nothing else.

Attacks and strategies are named by the report alone: a new one needs no change here.
"""

import statistics
from collections.abc import Callable
from typing import Any

from ..convert.report import distances, evaluation_words
from ..reporting import Curve, Plot, Section, Table, grouped, headings
from ..reporting.html import document
from ..reporting.words import bytes_words, cell, flops_words, rate_words, ratio_words, seconds_words
from .gradients import gradient_section
from .module_section import module_section
from .price_sections import depth_section, price_section
from .report import (
    AttackerCost,
    AuditReport,
    Price,
    Run,
    StepCost,
    Structural,
    Verdict,
    cheapest_step,
)
from .verdict import MEASURES, ORIGINAL
from .worth import collapses, worth_words

_STEP: dict[str, Callable[[float], str]] = {
    "flops": flops_words, "peak": bytes_words, "held": bytes_words, "launches": "{:,}".format,
    "dependent": "{:,}".format, "seconds": seconds_words,
}  # fmt: skip
_SWAP = "swap"  # takes the original's own MLPs, which the threat model rules out: it always succeeds
_PUBLIC = "Where the original is public the lock is worth nothing: its MLPs can be put back."
_PRICE = "target | fine-tunes | measure | locked: attack | strategy | cost | original: attack | strategy | cost | ratio"
_NOT_RUN = "Not run; the notes say why."


def page(report: AuditReport) -> str:
    """The audit as one HTML document; the same report gives the same characters, with one version of matplotlib."""
    head, *sections = audit_sections(report)
    return document(head, sections)


def audit_sections(report: AuditReport) -> list[Section]:
    """The price and the verdicts in words, and then every part of an audit in the order of reading; those not run are
    there too."""
    parts = (
        _head, _price, _attacked, _verdicts, _structural, module_section, _learning, gradient_section, _steps,
        _asymmetry, depth_section, _notes, _how,
    )  # fmt: skip
    return [part(report) for part in parts]


def verdict_words(report: AuditReport) -> list[str]:
    """A paragraph for each target, then one on the attacks that train nothing end to end."""
    targets = grouped(report.verdicts, lambda v: (v.share, v.loss)).values()
    words = [_target_words(rows, _strategy_words(report)) for rows in targets]
    if not words:
        words = ["No target has a verdict: no learning attack gave one. The notes say why."]
    return [*words, _way_around(report)]


def _head(report: AuditReport) -> Section:
    price = report.price.words if report.price else []
    return Section(
        f"Audit of {report.locked}, locked from {report.original}",
        "\n".join([*price, worth_words(report), *verdict_words(report), *collapses(report.runs)]),
    )


def _price(report: AuditReport) -> Section:
    return price_section(report, _strategy_words(report))


def _attacked(report: AuditReport) -> Section:
    fidelity = f"Fidelity of the locked model: {evaluation_words(report.fidelity)}"
    return Section("What was attacked", f"Threat model: {report.threat}\n{fidelity}")


def _target_words(rows: list[Verdict], strategy: Callable[[Price], str]) -> str:
    """One target: every measure where one redistillation serves the fewest fine-tunes, what more of them change, and
    the measure in which the lock is weakest."""
    first = rows[0]
    words = (
        f"To reach {first.share:.0%} of the original's best gain (a held-out loss of {first.loss:.3f} nats a token), "
        "the cheapest attack on the locked model takes, over the cheapest on the original, "
    )
    known: dict[str, str] = {}
    for tunes, group in grouped(rows, lambda v: v.tunes).items():
        new = [v for v in group if known.get(v.measure) != _measure_words(v)]
        known |= {v.measure: _measure_words(v) for v in group}
        if group[0] is first:
            words += f"{_measures_words(group, strategy)}."
        elif new:
            words += f" Where one redistillation serves {tunes} fine-tunes: {_measures_words(new, strategy)}."
    priced = [(v.ratio, v) for v in rows if v.ratio is not None and not v.bound]
    if not priced:
        return words
    low, weakest = min(priced, key=lambda pair: pair[0])
    serves = f" where one redistillation serves {weakest.tunes} fine-tunes" if weakest.tunes > 1 else ""
    return f"{words} The lock is weakest in {MEASURES[weakest.measure][0]}{serves}: {ratio_words(low)} times."


def _measures_words(rows: list[Verdict], strategy: Callable[[Price], str]) -> str:
    """The measures in which one attack is the cheapest stand together, with its name."""
    parts = []
    for group in grouped(rows, lambda v: v.locked and (v.locked.attack, v.locked.strategy)).values():
        price, words = group[0].locked, ", ".join(map(_measure_words, group))
        by = f", by '{price.attack}' ({strategy(price)})" if price and not group[0].bound else ""
        parts.append(words + by)
    return "; ".join(parts)


def _measure_words(v: Verdict) -> str:
    what, worded = MEASURES[v.measure]
    if v.locked is None or v.original is None or v.ratio is None:
        missing = "locked model" if v.locked is None else "original"
        lacks = "reached it" if v.original and v.original.bound else "has a price"
        return f"an unknown multiple of the {what} (no attack on the {missing} {lacks})"
    ours, theirs = worded(v.locked.cost), worded(v.original.cost)
    if v.bound:
        spent = f"no attack reached it: {ours} spent, against {theirs}"
        return f"more than {v.ratio:.3g} times the {what} ({spent})"
    return f"{v.ratio:.3g} times the {what} ({ours} against {theirs})"


def _way_around(report: AuditReport) -> str:
    """What the structural attacks leave of the lock."""
    rows = [row for row in report.structural if row.name != _SWAP]
    public = "" if len(rows) == len(report.structural) else f" {_PUBLIC}"
    if not rows:
        return f"No structural attack was run.{public}"
    good = [row for row in rows if row.slots != "chain" and report.recovers(row) <= 1]
    if good:
        return " ".join(_recovered(report, row) for row in good) + public
    near = min(rows, key=report.recovers)
    return (
        f"No structural attack brings the model as near to the original as the locked model is. The nearest, "
        f"'{near.name}', leaves {report.recovers(near):.3g} times the locked model's distance.{public}"
    )


def _recovered(report: AuditReport, row: Structural) -> str:
    costs = ((row.flops, flops_words), (row.seconds, seconds_words))
    also = "" if row.slots == "MLP" else ", or two wide steps, which train as cheaply"
    spent = [words(cost) for cost, words in costs if cost is not None]
    return (
        f"'{row.name}' brings the model at least as near to the original as the locked model is "
        f"({report.recovers(row):.3g} of its distance), for "
        f"{' and '.join(spent) or 'no more than reading the weights'}; the chains are MLPs then{also}."
    )


def _verdicts(report: AuditReport) -> Section:
    strategy = _strategy_words(report)

    def shown(v: Verdict) -> str:
        by = "" if v.bound or not v.locked else f" by {v.locked.attack}"
        return ratio_words(v.ratio, v.bound) + by if v.locked else "no price"

    def price(v: Verdict, side: Price | None) -> tuple[str, str, str]:
        if side is None:
            return "no price", "-", "-"
        cost = MEASURES[v.measure][1](side.cost)
        return side.attack, strategy(side), f"more than {cost}" if side.bound else cost

    def target(v: Verdict) -> tuple[str, str]:
        return f"{v.share:.0%}, loss {v.loss:.3f}", str(v.tunes)

    rows, prices = [], []
    for key, same in grouped(report.verdicts, target).items():
        cells = {v.measure: shown(v) for v in same}
        rows.append((*key, *(cells.get(measure, "") for measure in MEASURES)))
    for v in report.verdicts:
        sides = *price(v, v.locked), *price(v, v.original), ratio_words(v.ratio, v.bound)
        prices.append((*target(v), MEASURES[v.measure][0], *sides))
    return Section(
        "Verdicts",
        "What the cheapest attack on the locked model costs, over the cheapest on the original, to reach the "
        "same loss, and its name. Where one redistillation serves several fine-tunes, each bears its share; "
        "'more than': the budget ended first. Peak memory is the same for any number of fine-tunes.",
        Table(headings("target | fine-tunes | FLOPs | seconds | peak memory"), rows, empty=_NOT_RUN),
        details=[Table(headings(_PRICE), prices, "Every price")],
    )


def _structural(report: AuditReport) -> Section:
    """The locked model itself stands first: the distance that the others are measured by."""
    own = distances(report.fidelity)
    rows = [("the locked model", *own.values(), "1", "chain", "-", "-", "-")]
    rows += [
        (
            row.name, *distances(row.evaluation).values(), f"{report.recovers(row):.3g}", row.slots,
            f"{row.train_tokens:,}", cell(row.flops, flops_words, "none"), cell(row.seconds, seconds_words, "none"),
        )
        for row in report.structural
    ]  # fmt: skip
    columns = ("attack", *own, "distance", "in the slots", "training tokens", "FLOPs", "seconds")
    return Section(
        "Structural attacks",
        "Ways to turn every chain back into an MLP, or into fewer steps, without training the model end to end. "
        "Distance: how far from the original the attack leaves the model, over the locked model's own distance; 1 "
        "or less, with MLPs or two steps in the slots, is a way around the lock.",
        Table(columns, rows, minor=("training tokens",)),
        [f"{row.name}: {row.about}." for row in report.structural],
    )


def _start_loss(report: AuditReport) -> float | None:
    """The original's loss on the task before any training, which every gain is counted from; None: not run."""
    return next((run.losses[0] for run in report.runs if run.variant == ORIGINAL and run.losses), None)


def _learning(report: AuditReport) -> Section:
    start = _start_loss(report)
    attacks = grouped(report.runs, lambda r: (r.variant, r.attack))

    def every(r: Run) -> tuple[str, ...]:
        noted = (("best rate", r.best), ("diverged", r.diverged), ("given up", r.given_up))
        marks = [mark for mark, there in noted if there]
        curve = ", ".join(
            f"{n:,}:\N{NO-BREAK SPACE}{loss:.4f}" for n, loss in zip(r.tokens, r.losses, strict=True)
        )
        return (
            r.variant, r.attack, rate_words(r.rate), str(r.seed), ", ".join(marks) or "-", f"{r.neutral[0]:.3f}",
            cell(r.neutral[1], ".3f"), f"{r.batch:,}", seconds_words(r.seconds), curve,
        )  # fmt: skip

    best = "variant | attack | rate | seeds | loss | range | gain | neutral | rates tried"
    names = "variant | attack | rate | seed | note | neutral before | after | tokens a step | step time | tokens: loss"
    rows = [_attack_cells(*key, runs, start) for key, runs in attacks.items()]
    return Section(
        "Learning attacks",
        "Fine-tuning on a task, each attack at the best rate of a sweep. Loss: on held-out text of the task, at "
        "the end, mean and range over seeds. Gain: the original's loss before training minus that. Neutral: the "
        "loss on other text, before and after; where it jumps, the model has collapsed and the gain is worth "
        "little. Rates are constant after a warm-up and chosen on the first seed, where a run plainly behind another "
        "is given up; two seeds that gained the same have no third. What the sweep took is left out on every side.",
        Table(headings(best), rows, empty=_NOT_RUN),
        [f"{name}: {about.rstrip('.')}." for name, about in report.attacks.items()] if report.runs else [],
        plots=_gain_plots(report),
        caption="Colour: variant; stroke and mark: attack; band: least to most over seeds; dashed levels: the "
        "verdicts' targets. FLOPs and seconds are those of each attack's cheapest strategy; what a redistillation took "
        "before is not in the curves, but in the verdicts.",
        details=[Table(headings(names), list(map(every, report.runs)), "Every run")],
    )


def _attack_cells(variant: str, attack: str, runs: list[Run], start: float | None) -> tuple[str, ...]:
    best = [run for run in runs if run.best]
    whole = [run for run in best if not run.diverged]
    rates = ", ".join(
        rate_words(rate) + (" diverged" if any(run.diverged for run in tried) else "")
        for rate, tried in grouped(sorted(runs, key=lambda r: r.rate), lambda r: r.rate).items()
    )
    seeds = f"{len(best)}" + (f", {len(best) - len(whole)} diverged" if len(whole) < len(best) else "")
    rate = rate_words(best[0].rate) if best else "none"
    if not whole:
        return variant, attack, rate, seeds, "-", "-", "-", "-", rates
    ends = [run.losses[-1] for run in whole]
    mean = statistics.fmean(ends)
    pairs = [(before, after) for before, after in (run.neutral for run in whole) if after is not None]
    before, after = (statistics.fmean(losses) for losses in zip(*pairs, strict=True))
    return (
        variant, attack, rate, seeds, f"{mean:.4f}", f"{min(ends):.3f} to {max(ends):.3f}",
        "-" if start is None else f"{start - mean:+.4f}", f"{before:.2f}, {after:.2f}", rates,
    )  # fmt: skip


def _gain_plots(report: AuditReport) -> list[Plot]:
    """Gain of the runs at their best rates, the mean over seeds and its band, against tokens, FLOPs and seconds."""
    start = _start_loss(report)
    best = grouped((run for run in report.runs if run.best), lambda r: (r.variant, r.attack))
    if start is None or not best:
        return []

    def price(run: Run, measure: str) -> float | None:
        """The cheapest strategy's cost of a token, None where no step was measured."""
        if measure == "tokens":
            return 1
        step = cheapest_step(report.steps, run.variant, run.attack, measure)
        return None if step is None else getattr(step, measure) / step.tokens

    def curves(measure: str) -> list[Curve]:
        found = []
        for (variant, attack), runs in best.items():
            if (each := price(runs[0], measure)) is None:
                continue
            # Where a seed diverged the mean ends: that of the others would be of fewer runs than it says.
            points = list(zip(*([start - loss for loss in run.losses] for run in runs), strict=False))
            x = [n * each for n in runs[0].tokens[: len(points)]]
            band = list(map(min, points)), list(map(max, points))
            found.append(Curve(x, list(map(statistics.fmean, points)), variant, attack, band))
        return found

    levels = [start - loss for loss in dict.fromkeys(v.loss for v in report.verdicts)]
    return [
        Plot(f"gain against {label}", label, "gain, nats a token", curves(measure), levels)
        for measure, label in (("tokens", "tokens"), ("flops", "FLOPs"), ("seconds", "seconds"))
    ]


def _steps(report: AuditReport) -> Section:
    strategy = _strategy_words(report)
    # All weights of the original, trained by plain autograd: what every step is compared with.
    base = next((s for s in report.steps if s.variant == ORIGINAL and s.strategy == "plain"), None)

    def ratio(step: StepCost, measure: str) -> float | None:
        """Over the plain step; None where one was not measured or the steps are not of one size."""
        if base is None or base.tokens != step.tokens:
            return None
        ours, theirs = getattr(step, measure), getattr(base, measure)
        return None if ours is None or not theirs else ours / theirs

    def cheapest(variant: str, attack: str, measure: str) -> str:
        step = cheapest_step(report.steps, variant, attack, measure)
        found = None if step is None else ratio(step, measure)
        return "-" if step is None or found is None else f"{found:.3g} by {strategy(step)}"

    def figure(step: StepCost, measure: str, words: Callable[[float], str]) -> str:
        value, over = getattr(step, measure), ratio(step, measure)
        return cell(value, words) + ("" if value is None or over is None else f" ({ratio_words(over)})")

    def every(s: StepCost) -> tuple[str, ...]:
        figures = (figure(s, measure, words) for measure, words in _STEP.items())
        return s.variant, s.attack, strategy(s), f"{s.tokens:,}", *figures

    rows = [
        (*key, *(cheapest(*key, measure) for measure in ("flops", "peak", "seconds")))
        for key in dict.fromkeys((s.variant, s.attack) for s in report.steps)
    ]
    columns = "variant | attack | strategy | tokens | FLOPs | peak | held | launches | dependent | seconds"
    return Section(
        "Cost of a training step",
        "The cheapest strategy for each variant and attack, over a plain training step of all weights of the "
        "original, which is 1. In brackets: over that step.",
        Table(headings("variant | attack | FLOPs | peak | seconds"), rows, empty=_NOT_RUN),
        details=[Table(headings(columns), list(map(every, report.steps)), "Every strategy")],
        terms=["strategy"] if rows else [],
    )


def _asymmetry(report: AuditReport) -> Section:
    measures = list(dict.fromkeys(a.measure for a in report.asymmetries))
    rows = []
    for key, found in grouped(report.asymmetries, lambda a: (a.mode, a.forward)).items():
        cells = {a.measure: f"{a.value:.3g} ({a.locked}, {a.original})" for a in found}
        rows.append((*key, *(cells.get(measure, "-") for measure in measures)))
    slot = f"\nThe slot: {report.slot}." if report.slot and rows else ""
    return Section(
        "Asymmetry",
        "Backward over forward of a locked slot, over the same of the original's: how much dearer the lock makes "
        "training than running, with the strategies of the two sides. Eager alone measures a missing kernel; 'best' "
        f"measures the lock.{slot}",
        Table(("mode", "forward", *measures), rows, empty=_NOT_RUN),
    )


def _notes(report: AuditReport) -> Section:
    about = "What was not run, and what else an owner should know."
    return Section("Notes", about, notes=report.notes or ["None: everything was run."])


def _how(report: AuditReport) -> Section:
    took = seconds_words(report.seconds)
    facts = {"option": report.options, "machine": report.machine | {"the audit took": took}}
    rows = [(kind, name, _plain(value)) for kind, values in facts.items() for name, value in values.items()]
    table = Table(("", "what", "value"), rows, "Every choice of this audit, and the machine it ran on")
    return Section("How it was measured", f"The audit took {took}.", details=[table])


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    whole = isinstance(value, int) and not isinstance(value, bool)
    return cell(value, "," if whole else str)


def _strategy_words(report: AuditReport) -> Callable[[StepCost | Price | AttackerCost], str]:
    """Words a strategy without what all of its attack's begin with: that says what the attack beside them says."""
    prefixes = {}
    for attack, steps in grouped(report.steps, lambda s: s.attack).items():
        parts = [step.strategy.split(", ") for step in steps]
        shared = 0
        while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
            shared += 1
        prefixes[attack] = "".join(f"{part}, " for part in parts[0][:shared])

    def words(trained: StepCost | Price | AttackerCost) -> str:
        attack = trained.attack.rpartition(", ")[2]  # a price's begins with the variant
        return trained.strategy.removeprefix(prefixes.get(attack, ""))

    return words
