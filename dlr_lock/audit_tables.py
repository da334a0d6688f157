"""An audit for a terminal: the verdict in words, then a table for each part, within 100 columns."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .audit.report import AuditReport
from .audit.words import Section, seconds_words, sections, verdict_words
from .convert.report import evaluation_words

_WIDTH = 100
_NAME, _FIGURE = 36, 14  # characters of a cell, in the first column and in others, that are never folded


def print_audit(console: Console, report: AuditReport) -> None:
    """Prints what the page shows at first sight; every copy, run and policy is in the page and in the JSON."""
    width = min(_WIDTH, console.width)

    def say(words: str, style: str = "") -> None:
        console.print(Text(words, style), width=width)

    say(f"{report.locked}, locked from {report.original}", "bold")
    for words in verdict_words(report):
        say(words + "\n")
    say(f"Threat model. {report.threat}")
    say(f"\nFidelity of the locked model. {evaluation_words(report.fidelity)}")
    for part in sections(report).values():
        if part.rows:
            say(f"\n{part.title}", "bold")
            console.print(_table(part), width=width)
    say("\nNotes", "bold")
    for note in report.notes:
        say(f"- {note}")
    say(f"the audit took {seconds_words(report.seconds)}")


def _table(part: Section) -> Table:
    """Cells are text, never markup: names come from others. Names and figures stay in one piece, words are folded."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for at, column in enumerate(part.columns):
        widest = max(len(row[at]) for row in part.rows)
        table.add_column(Text(column), overflow="fold", no_wrap=widest <= (_NAME if at == 0 else _FIGURE))
    for row in part.rows:
        table.add_row(*map(Text, row))
    return table
