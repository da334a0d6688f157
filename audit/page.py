"""An audit as one HTML document for the owner of a model: it loads nothing, runs nothing and fits a phone."""

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from ..convert.report import evaluation_words
from .plots import gain_plots, student_plot
from .report import AuditReport, Price, Run, StepCost, Verdict
from .words import (
    MEASURES,
    Section,
    bytes_words,
    evaluation_columns,
    flops_words,
    plain_step,
    rate_words,
    ratio_words,
    seconds_words,
    sections,
    step_ratio,
    strategy_words,
    verdict_words,
)

_STYLE = """
:root { color-scheme: light dark; --line: #d4d7dc; --soft: #f3f5f7; --quiet: #5b6470; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3b424b; --soft: #1f242a; --quiet: #a3acb8; }
  body { background: #14181c; color: #e4e7eb; }
  a { color: #8ab8f0; }
}
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; overflow-wrap: break-word; }
main { max-width: 64rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; padding-top: .75rem; border-top: 1px solid var(--line); }
p, li { max-width: 46rem; }
.verdict { background: var(--soft); border-left: 4px solid #d9730d; padding: .25rem 1rem; }
.quiet { color: var(--quiet); font-size: .9rem; }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; min-width: 60%; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; }
th { background: var(--soft); vertical-align: bottom; }
.n { text-align: right; }
td.n, td.k { white-space: nowrap; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.plot { flex: 1 1 24rem; max-width: 32rem; min-width: 0; }
.plot svg { display: block; width: 100%; height: auto; }
summary { cursor: pointer; font-size: .9rem; }
"""
_ATTACKS = (
    "Variants: the original, the locked model, and the locked model whose chains were distilled back into MLPs, for that "
    "share of the conversion's train_tokens. Attacks: full trains all weights; LoRA adapters of all that is linear and of "
    "the chains; attention adapters of all but the MLPs' places, with the chains as they are; MeZO works with forward "
    "passes alone."
)


_SHORT = 16  # characters
_UNIT = r"[kMGTPE]?FLOP|bytes|[KMG]iB|s|min|h"
_FIGURE = re.compile(rf"(more than )?[-+]?\d[\d,.]*(e[-+]\d+)?%?( ({_UNIT}))?( \([\d.e+-]+\))?|-|none")


def page(report: AuditReport) -> str:
    """The document. The same report gives the same characters, with one version of matplotlib."""
    title = f"Audit of {report.locked}, locked from {report.original}"
    parts = sections(report)
    links = {name: part.title for name, part in parts.items()} | {
        "notes": "Notes",
        "how": "How it was measured",
    }
    nav = " · ".join(f'<a href="#{name}">{escape(text)}</a>' for name, text in links.items())
    verdicts = "".join(f"<p>{escape(words)}</p>\n" for words in verdict_words(report))
    after: dict[str, Callable[[AuditReport], str]] = {
        "verdicts": _every_price, "structural": _abouts, "modules": _every_copy, "learning": _every_run,
        "steps": _every_step,
    }  # fmt: skip
    body = "".join(
        _section(name, part, after[name](report) if name in after else "") for name, part in parts.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<div class="verdict">\n{verdicts}</div>\n'
        f"<p><strong>Threat model.</strong> {escape(report.threat)}</p>\n"
        f'<p class="quiet">{nav}</p>\n{body}{_notes(report)}{_how(report)}</main>\n</body>\n</html>\n'
    )


def _section(name: str, part: Section, after: str) -> str:
    table = _table(part.columns, part.rows) or '<p class="quiet">Not run; the notes say why.</p>\n'
    return f'<h2 id="{name}">{escape(part.title)}</h2>\n<p>{escape(part.about)}</p>\n{table}{after}'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Figures stand to the right, short words in one piece; a wide table scrolls by itself."""
    rows = list(rows)
    if not rows:
        return ""
    kinds = []
    for column in zip(*rows, strict=True):
        short = " class=k" if max(map(len, column)) <= _SHORT else ""
        kinds.append(" class=n" if all(map(_FIGURE.fullmatch, column)) else short)

    def line(tag: str, cells: Sequence[str]) -> str:
        put = (f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(put)}</tr>\n"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table>\n<thead>{line("th", columns)}</thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'


def _folded(what: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A long table that opens on a click."""
    if not rows:
        return ""
    return f"<details><summary>{escape(what)} ({len(rows)})</summary>\n{_table(columns, rows)}</details>\n"


def _every_price(report: AuditReport) -> str:
    def price(v: Verdict, side: Price | None) -> tuple[str, str, str]:
        if side is None:
            return "no price", "-", "-"
        cost = MEASURES[v.measure][1](side.cost)
        return side.attack, strategy_words(side.strategy), f"more than {cost}" if side.bound else cost

    rows = [
        (
            f"{v.share:.0%}, loss {v.loss:.3f}", f"{v.tunes}", MEASURES[v.measure][0], *price(v, v.locked),
            *price(v, v.original), ratio_words(v.ratio, v.bound),
        )
        for v in report.verdicts
    ]  # fmt: skip
    columns = (
        "target", "fine-tunes", "measure", "locked: attack", "strategy", "cost", "original: attack", "strategy", "cost",
        "ratio",
    )  # fmt: skip
    return _folded("Every price", columns, rows)


def _abouts(report: AuditReport) -> str:
    items = "".join(
        f"<li><strong>{escape(row.name)}:</strong> {escape(row.about)}</li>\n" for row in report.structural
    )
    names = ", ".join(evaluation_columns(report.fidelity))
    units = (
        "State error: of the last hidden states, relative; cosine: between the means of a sequence's states."
        if "cosine" in names
        else "Loss gap and KL to the original in nats a token; flips: how often the likeliest token differs."
    )
    listed = f"<ul>\n{items}</ul>\n" if items else ""
    kept = f"<p>Fidelity of the locked model: {escape(evaluation_words(report.fidelity))}</p>\n"
    return f'{listed}{kept}<p class="quiet">{units} Visits: tokens that each module was run on.</p>\n'


def _every_copy(report: AuditReport) -> str:
    rows = [
        (
            m.module, c.init, f"{c.train_tokens:,}", "-" if c.share is None else f"{c.share:.3g}", f"{c.error:.4f}",
            f"{c.student_error:.4f}", f"{c.error / m.chain_error:.3g}", seconds_words(c.seconds),
        )
        for m in report.modules
        for c in m.students
    ]  # fmt: skip
    columns = (
        "module", "start", "training tokens", "share", "error", "error against the chain", "ratio", "seconds",
    )  # fmt: skip
    return student_plot(report) + _folded("Every copy", columns, rows)


def _every_run(report: AuditReport) -> str:
    def row(r: Run) -> tuple[str, ...]:
        marks = [*(["best rate"] if r.best else []), *(["diverged"] if r.diverged else [])]
        after = "-" if r.neutral[1] is None else f"{r.neutral[1]:.3f}"
        curve = ", ".join(
            f"{n:,}:\N{NO-BREAK SPACE}{loss:.4f}" for n, loss in zip(r.tokens, r.losses, strict=True)
        )
        return (
            r.variant, r.attack, rate_words(r.rate), str(r.seed), ", ".join(marks) or "-", f"{r.neutral[0]:.3f}", after,
            f"{r.batch:,}", seconds_words(r.seconds), curve,
        )  # fmt: skip

    columns = (
        "variant", "attack", "rate", "seed", "note", "neutral before", "after", "tokens a step", "a step takes",
        "tokens: loss",
    )  # fmt: skip
    words = f'<p class="quiet">{_ATTACKS}</p>\n' if report.runs else ""
    return words + gain_plots(report) + _folded("Every run", columns, [row(r) for r in report.runs])


def _every_step(report: AuditReport) -> str:
    base = plain_step(report)

    def cell(step: StepCost, measure: str, words: Callable[[float], str]) -> str:
        value = getattr(step, measure)
        ratio = step_ratio(step, base, measure)
        return (
            "-" if value is None else words(value) + (f" ({ratio_words(ratio)})" if ratio is not None else "")
        )

    measures: dict[str, Callable[[float], str]] = {
        "flops": flops_words, "peak": bytes_words, "held": bytes_words, "launches": "{:,}".format,
        "dependent": "{:,}".format, "seconds": seconds_words,
    }  # fmt: skip
    rows = [
        (
            s.variant, s.attack, strategy_words(s.strategy), f"{s.tokens:,}",
            *(cell(s, measure, words) for measure, words in measures.items()),
        )
        for s in report.steps
    ]  # fmt: skip
    columns = (
        "variant",
        "attack",
        "strategy",
        "tokens",
        "FLOPs",
        "peak",
        "held",
        "launches",
        "dependent",
        "seconds",
    )
    words = (
        "In brackets: over the plain step. Held: activations kept from forward to backward; launches: operations "
        "started; dependent: the longest run of them in which each waits for the one before."
    )
    return _folded("Every strategy", columns, rows) + (f'<p class="quiet">{words}</p>\n' if rows else "")


def _notes(report: AuditReport) -> str:
    items = "".join(f"<li>{escape(note)}</li>\n" for note in report.notes)
    listed = f"<ul>\n{items}</ul>\n" if items else "<p>None: everything was run.</p>\n"
    return (
        f'<h2 id="notes">Notes</h2>\n<p>What was not run, and what else an owner should know.</p>\n{listed}'
    )


def _how(report: AuditReport) -> str:
    facts = {"option": report.options, "machine": report.machine}
    rows = [(kind, name, _plain(value)) for kind, values in facts.items() for name, value in values.items()]
    rows.append(("machine", "the audit took", seconds_words(report.seconds)))
    return (
        '<h2 id="how">How it was measured</h2>\n<p>Every choice of this audit, and the machine it ran on.</p>\n'
        + _table(("", "what", "value"), rows)
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)
