"""The price of the lock as sections: who pays what for how many fine-tunes, and what plain autograd takes by depth."""

from collections.abc import Callable

from ..reporting import Curve, Plot, Section, Table, grouped, headings
from ..reporting.words import bytes_words, ratio_words
from .price import ATTACKERS, CAREFUL, EXPERT, OWNER, SHARE, STANDARD, TUNES, cheapest, plain_step
from .report import AttackerCost, AuditReport
from .verdict import MEASURES, ORIGINAL

_EVERY = "measure | who | attack | strategy | training tokens | undoing | a fine-tune | peak"
_NO_PRICE = "Not known: no fine-tune of the original gained more than its seeds differ by, or none was run."
_WHO = {
    STANDARD: "plain autograd through the chains, as transformers' Trainer does it, rates by size; its price is memory",
    CAREFUL: "through the chains too, by the cheapest strategy that fits in the memory of the original's plain step, "
    "such as checkpoints",
    EXPERT: "first distils the chains back into MLPs, and then fine-tunes those; counted are the students that were "
    "kept, one a module, so that whoever tries several pays more",
    OWNER: "whoever has the original's weights, by the cheapest strategy",
}


def price_section(report: AuditReport, strategy: Callable[[AttackerCost], str]) -> Section:
    """What 1 to 1000 fine-tunes cost each attacker. strategy: words a strategy."""
    ways = report.price.attackers if report.price else []
    rows, plots = [], []
    for measure, found in grouped(ways, lambda a: a.measure).items():
        by_who = grouped(found, lambda a: a.who)
        for tunes in TUNES:
            least = {who: cheapest(some, tunes) for who, some in by_who.items()}
            cells = (_cell(least.get(who), least[OWNER], tunes) for who in ATTACKERS)
            rows.append((MEASURES[measure][0], f"{tunes:,}", *cells))
        plots.append(_plot(measure, by_who))
    every = [
        (
            MEASURES[a.measure][0], a.who, a.attack, strategy(a), f"{a.tokens:,.0f}",
            MEASURES[a.measure][1](a.first) if a.first else "-",
            ("more than " if a.bound else "") + MEASURES[a.measure][1](a.each), bytes_words(a.peak),
        )
        for a in ways
    ]  # fmt: skip
    return Section(
        "Price",
        f"What all of so many fine-tunes cost, each to {SHARE:.0%} of the original's best gain; in brackets over those "
        "of whoever has the original. 'More than': the budget ended before the gain was reached, and the figure is "
        "what was spent. What looking for a learning rate takes is left out on every side.",
        Table(("measure", "fine-tunes", *ATTACKERS), rows, empty=_NO_PRICE),
        [f"{who}: {about}{_by(report, ways, who, strategy)}." for who, about in _WHO.items()] if rows else [],
        plots=plots,
        caption="One fine-tune of so many, what was spent to undo the lock shared by all of them; where two lines "
        "coincide, the later one of the key is seen.",
        details=[Table(headings(_EVERY), every, "Every attacker")],
        terms=["peak"] if rows else [],
    )


def _cell(way: AttackerCost | None, base: AttackerCost, tunes: int) -> str:
    if way is None:
        return "-"
    cost = MEASURES[way.measure][1](way.total(tunes))
    return f"{'more than ' if way.bound else ''}{cost} ({ratio_words(way.total(tunes) / base.total(tunes))})"


def _by(
    report: AuditReport, ways: list[AttackerCost], who: str, strategy: Callable[[AttackerCost], str]
) -> str:
    """By which attack and strategy, in FLOPs, and in how much memory."""
    own = [a for a in ways if a.who == who and a.measure == "flops"]
    if not own:
        return " (not measured)"
    way = cheapest(own, TUNES[-1])
    attack = way.attack.rpartition(", ")[2]
    same = [s for s in report.steps if (s.variant, s.attack) == (ORIGINAL, attack)]
    plain = plain_step(same, "peak")
    over = (
        "" if not plain or who == OWNER else f", {way.peak / plain.peak:.3g} of a plain step of the original"
    )
    return f" ('{way.attack}', {strategy(way)}: {bytes_words(way.peak)} at the peak{over})"


def _plot(measure: str, by_who: dict[str, list[AttackerCost]]) -> Plot:
    curves = []
    for who in ATTACKERS:
        if some := by_who.get(who):
            least = [cheapest(some, tunes) for tunes in TUNES]
            stroke = "lower bound" if least[0].bound else ""
            curves.append(
                Curve(TUNES, [a.total(n) / n for n, a in zip(TUNES, least, strict=True)], who, stroke)
            )
    what = MEASURES[measure][0]
    title = f"{what} of a fine-tune against how many there are"
    return Plot(title, "fine-tunes", f"{what} a fine-tune", curves, log=True)


def depth_section(report: AuditReport) -> Section:
    """The paper's two claims, for the tools that everyone has."""

    def over(row: dict[str, float], base: dict[str, float], measure: str) -> str:
        return f"{row[measure]:.3g} ({base[measure]:.3g})"

    rows = [
        (
            str(d.depth), d.chain, bytes_words(d.saved), ratio_words(d.saved / d.original_saved),
            *(over(d.backward, d.original_backward, measure) for measure in ("flops", "launches", "dependent")),
        )
        for d in report.depths
    ]  # fmt: skip
    return Section(
        "Depth, for standard tooling",
        "Plain autograd in one slot, with chains of several depths and of the parameters of the original's MLP, "
        "counted. Saved: activations kept for the backward pass, and these over the MLP's. Then the backward pass over "
        "the runtime's inference pass, and in brackets the MLP's: in FLOPs, in launches, and in launches that wait for "
        "one another. What a better strategy makes of it stands in the asymmetry.",
        Table(
            headings("depth | chain | saved | over the MLP's | FLOPs | launches | dependent"),
            rows,
            empty="Not counted: the original's MLPs, or the chain's steps, are of another kind; the notes say which.",
        ),
    )
