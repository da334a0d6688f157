"""An audit in words and in tables of short cells, for the page and for the terminal alike."""

import statistics
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from ..convert.evaluate import Evaluation, StateEvaluation
from ..convert.report import UNDONE
from .asymmetry import Asymmetry
from .report import (
    AuditReport,
    ModuleStudents,
    Price,
    Run,
    StepCost,
    Structural,
    Student,
    Verdict,
    cheapest_step,
)

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Section:
    """about: what the table shows, for an owner who has not read the paper."""

    title: str
    about: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def sections(report: AuditReport) -> dict[str, Section]:
    """The parts of an audit by name, in the order of reading; those without a row are there too."""
    parts = {
        "verdicts": _verdicts, "structural": _structural, "modules": _modules, "learning": _learning,
        "steps": _steps, "asymmetry": _asymmetry,
    }  # fmt: skip
    return {name: part(report) for name, part in parts.items()}


def verdict_words(report: AuditReport) -> list[str]:
    """A paragraph for each target, then one on the attacks that train nothing end to end."""
    targets = grouped(report.verdicts, lambda v: (v.share, v.loss)).values()
    words = [_target_words(rows) for rows in targets]
    if not words:
        words = ["No target has a verdict: no learning attack gave one. The notes say why."]
    return [*words, _way_around(report)]


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by key, both in the order of first appearance."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def start_loss(report: AuditReport) -> float | None:
    """The original's loss on the task before any training, which every gain is counted from; None: not run."""
    return next((run.losses[0] for run in report.runs if run.variant == "original" and run.losses), None)


def plain_step(report: AuditReport) -> StepCost | None:
    """What the cost of every step is compared with: all weights of the original, trained by plain autograd."""
    plain = ("original", "full", "plain")
    return next((s for s in report.steps if (s.variant, s.attack, s.strategy) == plain), None)


def flops_words(value: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g} {unit}FLOP"
        value /= 1000
    return f"{value:,.3g} EFLOP"


def seconds_words(value: float) -> str:
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:,.3g} h"


def bytes_words(value: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:,.4g} GiB"


# The attack that takes the original's own MLPs, which the threat model rules out: it always succeeds.
_SWAP = "swap"
_PUBLIC = "Where the original is public the lock is worth nothing: its MLPs can be put back."

MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "flops": ("FLOPs", flops_words),
    "seconds": ("seconds", seconds_words),
    "peak": ("peak memory", bytes_words),
}


def rate_words(value: float) -> str:
    """A learning rate, such as 3.2e-4 or 1e-6."""
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def ratio_words(value: float | None, bound: bool = False) -> str:
    """A ratio in a cell; '-' where there is none."""
    return "-" if value is None else f"{'more than ' if bound else ''}{value:.3g}"


def strategy_words(strategy: str) -> str:
    """A strategy without what it trains, which stands beside it as the attack."""
    for prefix in ("LoRA on attention, ", "LoRA, "):
        strategy = strategy.removeprefix(prefix)
    return strategy


def evaluation_cells(e: Evaluation | StateEvaluation) -> tuple[str, ...]:
    """Under `evaluation_columns`."""
    if isinstance(e, StateEvaluation):
        return f"{e.state_error:.4f}", f"{e.cosine:.4f}"
    return f"{e.loss_gap:+.4f}", f"{e.kl:.4f}", f"{100 * (e.flips or 0):.1f}%"


def evaluation_columns(e: Evaluation | StateEvaluation) -> tuple[str, ...]:
    return ("state error", "cosine") if isinstance(e, StateEvaluation) else ("loss gap", "KL", "flips")


def _target_words(rows: list[Verdict]) -> str:
    """One target: every measure at the fewest fine-tunes for one redistillation, what more of them change, the weakest."""
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
            words += f"{_measures_words(group)}."
        elif new:
            words += f" Where one redistillation serves {tunes} fine-tunes: {_measures_words(new)}."
    priced = [(v.ratio, v) for v in rows if v.ratio is not None and not v.bound]
    if not priced:
        return words
    low, weakest = min(priced, key=lambda pair: pair[0])
    serves = f" where one redistillation serves {weakest.tunes} fine-tunes" if weakest.tunes > 1 else ""
    what = MEASURES[weakest.measure][0]
    return f"{words} The lock is weakest in {what}{serves}: {ratio_words(low)} times."


def _measures_words(rows: list[Verdict]) -> str:
    """Those that one attack has the least of stand together."""
    groups = grouped(rows, lambda v: v.locked and (v.locked.attack, v.locked.strategy)).values()
    return "; ".join(
        ", ".join(map(_measure_words, group))
        + (f", by {_who(group[0].locked)}" if group[0].locked and not group[0].bound else "")
        for group in groups
    )


def _measure_words(v: Verdict) -> str:
    what, worded = MEASURES[v.measure]
    if v.locked is None or v.original is None or v.ratio is None:
        missing = "locked model" if v.locked is None else "original"
        lacks = "reached it" if v.original and v.original.bound else "has a price"
        return f"an unknown multiple of the {what} (no attack on the {missing} {lacks})"
    ours, theirs = worded(v.locked.cost), worded(v.original.cost)
    if v.bound:
        return (
            f"more than {v.ratio:.3g} times the {what} (no attack reached it: {ours} spent, against {theirs})"
        )
    return f"{ratio_words(v.ratio, v.bound)} times the {what} ({ours} against {theirs})"


def _who(price: Price) -> str:
    return f"'{price.attack}' ({strategy_words(price.strategy)})"


def _way_around(report: AuditReport) -> str:
    """What the structural attacks leave of the lock."""
    rows = [row for row in report.structural if row.name != _SWAP]
    public = "" if len(rows) == len(report.structural) else f" {_PUBLIC}"
    if not rows:
        return f"No structural attack was run.{public}"
    good = [row for row in rows if row.slots == "MLP" and report.recovers(row) <= 1]
    if good:
        return " ".join(_recovered(report, row) for row in good) + public
    near = min(rows, key=report.recovers)
    return (
        f"No structural attack brings the model as near to the original as the locked model is. The nearest, "
        f"'{near.name}', leaves {report.recovers(near):.3g} times the locked model's distance.{public}"
    )


def _recovered(report: AuditReport, row: Structural) -> str:
    spent = [
        *([] if row.flops is None else [flops_words(row.flops)]),
        *([] if row.seconds is None else [seconds_words(row.seconds)]),
    ]
    return (
        f"'{row.name}' brings the model at least as near to the original as the locked model is "
        f"({report.recovers(row):.3g} of its distance), for "
        f"{' and '.join(spent) or 'no more than reading the weights'}; the chains are MLPs then."
    )


def _verdicts(report: AuditReport) -> Section:
    def cell(rows: list[Verdict], measure: str) -> str:
        return " and ".join(
            f"{ratio_words(v.ratio, v.bound)}{'' if v.bound else f' by {v.locked.attack}'}"
            if v.locked
            else "no price"
            for v in rows
            if v.measure == measure
        )

    return Section(
        "Verdicts",
        "What the cheapest attack on the locked model costs, over the cheapest on the original, to reach the same "
        "loss, and its name. Where one redistillation serves several fine-tunes, each bears its share; 'more than': the "
        "budget ended first. Peak memory is the same for any number of fine-tunes.",
        ("target", "fine-tunes", *(name for name, _ in MEASURES.values())),
        [
            (
                f"{share:.0%}, loss {loss:.3f}",
                f"{tunes}",
                *(cell(rows, measure) for measure in MEASURES),
            )
            for (share, loss, tunes), rows in grouped(
                report.verdicts, lambda v: (v.share, v.loss, v.tunes)
            ).items()
        ],
    )


def _structural(report: AuditReport) -> Section:
    """The locked model itself stands first: the distance that the others are measured by."""
    untouched = ("the locked model", *evaluation_cells(report.fidelity), "1", "chain", "-", "-", "-")
    return Section(
        "Structural attacks",
        "Ways to turn every chain back into an MLP, or into fewer steps, without training the model end to end. "
        "Distance: how far from the original the attack leaves the model, over the locked model's own distance; 1 or "
        "less, with MLPs in the slots, is a way around the lock.",
        ("attack", *evaluation_columns(report.fidelity), "distance", "in the slots", "training tokens", "FLOPs", "seconds"),
        [untouched]
        + [
            (
                row.name, *evaluation_cells(row.evaluation), f"{report.recovers(row):.3g}", row.slots,
                f"{row.train_tokens:,}", "none" if row.flops is None else flops_words(row.flops),
                "none" if row.seconds is None else seconds_words(row.seconds),
            )
            for row in report.structural
        ],
    )  # fmt: skip


def _modules(report: AuditReport) -> Section:
    def row(m: ModuleStudents) -> tuple[str, ...]:
        copy = m.undone(UNDONE)
        good = min(m.students, key=lambda c: c.error, default=None) if copy is None else copy
        return (
            m.module, m.chain, f"{m.chain_error:.4f}", f"{m.gap:.2f}", "no" if copy is None else "yes",
            *(("-",) * 4 if good is None else _copy_cells(m, good)),
        )  # fmt: skip

    return Section(
        "Re-distillation, module by module",
        "An attacker trains an MLP to do what one chain does. The chain is undone where the copy's error against the "
        f"original MLP is at most {UNDONE} times the chain's own. A row shows the cheapest such copy, or else the "
        "best; share: its train_tokens over those of the module's conversion; ratio: its error over the chain's.",
        ("module", "chain", "error", "flatten gap", "undone", "start", "training tokens", "share", "ratio"),
        [row(m) for m in report.modules],
    )  # fmt: skip


def _copy_cells(m: ModuleStudents, copy: Student) -> tuple[str, str, str, str]:
    share = "-" if copy.share is None else f"{copy.share:.3g}"
    return copy.init, f"{copy.train_tokens:,}", share, f"{copy.error / m.chain_error:.3g}"


def _learning(report: AuditReport) -> Section:
    start = start_loss(report)
    return Section(
        "Learning attacks",
        "Fine-tuning on a task, each attack at the best rate of a sweep. Loss: on held-out text of the task, at the "
        "end, mean and range over seeds. Gain: the original's loss before training minus that. Neutral: the loss on "
        "other text, before and after; where it jumps, the model has collapsed and the gain is worth little. Rates are "
        "constant after a warm-up and chosen on the first seed; what the sweep took is left out on every side.",
        ("variant", "attack", "rate", "seeds", "loss", "range", "gain", "neutral", "rates tried"),
        [
            _attack_cells(variant, attack, runs, start)
            for (variant, attack), runs in grouped(report.runs, lambda r: (r.variant, r.attack)).items()
        ],
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


def _steps(report: AuditReport) -> Section:
    base = plain_step(report)

    def cheapest(variant: str, attack: str, measure: str) -> str:
        step = cheapest_step(report.steps, variant, attack, measure)
        ratio = None if step is None else step_ratio(step, base, measure)
        return "-" if step is None or ratio is None else f"{ratio:.3g} by {strategy_words(step.strategy)}"

    return Section(
        "Cost of a training step",
        "The cheapest strategy for each variant and attack, over a plain training step of all weights of the original, which "
        "is 1. A strategy is a way to work out the same gradient: recomputing, inverting, look-ahead. Peak memory is of "
        "activations and gradients; weights and the optimizer's state are left out.",
        ("variant", "attack", "FLOPs", "peak memory", "seconds"),
        [
            (
                variant,
                attack,
                *(cheapest(variant, attack, measure) for measure in ("flops", "peak", "seconds")),
            )
            for variant, attack in dict.fromkeys((s.variant, s.attack) for s in report.steps)
        ],
    )


def step_ratio(step: StepCost, base: StepCost | None, measure: str) -> float | None:
    """A step's measure over the plain step's; None where one was not measured or the steps are not of one size."""
    if base is None or base.tokens != step.tokens:
        return None
    ours, theirs = getattr(step, measure), getattr(base, measure)
    return None if ours is None or not theirs else ours / theirs


def _asymmetry(report: AuditReport) -> Section:
    measures = list(dict.fromkeys(a.measure for a in report.asymmetries))

    def cell(rows: list[Asymmetry], measure: str) -> str:
        cells = (
            f"{a.value:.3g} ({strategy_words(a.locked)}, {strategy_words(a.original)})"
            for a in rows
            if a.measure == measure
        )
        return " and ".join(cells) or "-"

    return Section(
        "Asymmetry",
        "Backward over forward of a locked slot, over the same of the original's: how much dearer the lock makes "
        "training than running, with the strategies of the two sides. Eager alone measures a missing kernel; 'best' "
        "measures the lock. Forward: the chain step by step (reference) or as the runtime runs it.",
        ("mode", "forward", *measures),
        [
            (mode, forward, *(cell(rows, measure) for measure in measures))
            for (mode, forward), rows in grouped(report.asymmetries, lambda a: (a.mode, a.forward)).items()
        ],
    )
