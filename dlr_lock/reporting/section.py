"""What a result shows, as plain data: text, tables and curves, before any renderer."""

import re
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

_UNIT = r"[kMGTPE]?FLOP|bytes|[KMG]iB|s|min|h"
_FIGURE = re.compile(
    rf"(more than |at most )?[-+]?\d[\d,.]*(e[-+]\d+)?%?( ({_UNIT}))?( \([\d.e+-]+\))?|-|none|"
)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under columns. Cells are text and never markup: names in them come from others.

    Attributes:
        columns: The headings. Those that `legend.TERMS` knows are explained once, below all sections.
        rows: A cell a column; "" or "-" where there is nothing to say.
        title: What the rows are, for a table that is folded away.
        minor: Columns that are left out where there is no room for all of them.
        left: Columns besides the first that stand to the left on a page, where all others stand to the right.
        empty: The sentence in place of a table that has no rows.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    minor: Collection[str] = ()
    left: Collection[str] = ()
    empty: str = ""

    def column(self, at: int) -> list[str]:
        """The cells of one column, without its heading."""
        return [row[at] for row in self.rows]

    def is_figures(self, at: int) -> bool:
        """Whether a column holds nothing but figures, which stand to the right."""
        return all(map(_FIGURE.fullmatch, self.column(at)))

    def keeping(self, at: Iterable[int]) -> "Table":
        """The same with these columns alone."""
        kept = list(at)
        rows = [tuple(row[n] for n in kept) for row in self.rows]
        return replace(self, columns=tuple(self.columns[n] for n in kept), rows=rows)

    def filled(self) -> "Table":
        """The same without the columns that no row fills."""
        return self.keeping(
            n for n in range(len(self.columns)) if any(c not in ("", "-") for c in self.column(n))
        )


@dataclass(frozen=True, slots=True)
class Curve:
    """A line through points. Curves of one `colour` name have one colour, those of one `stroke` name one stroke.

    Attributes:
        x, y: The points.
        colour, stroke: What the line is of; the names stand in the plot's key.
        band: (low, high) at every x, such as over seeds.
    """

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    stroke: str = ""
    band: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True, slots=True)
class Plot:
    """Curves on the same axes.

    Attributes:
        title: What is shown, for whoever cannot see it; also what ids in the drawing are made from.
        x_label, y_label: Of the axes.
        levels: Where dashed lines cross the plot.
        log: Whether both axes are logarithmic.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    levels: Sequence[float] = ()
    log: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """One part of a result, in the order in which it is read.

    Attributes:
        title: Of the section; "" for one that goes on with what came before.
        text: Paragraphs before the table, a line each.
        table: The figures.
        notes: Sentences in a list, after the table.
        plots: The curves, where they can be drawn.
        caption: What the plots show.
        details: Long tables, folded away in a document and left out on a terminal.
        terms: Terms of `legend.TERMS` that the section uses outside its headings.
    """

    title: str
    text: str = ""
    table: Table | None = None
    notes: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    caption: str = ""
    details: Sequence[Table] = ()
    terms: Sequence[str] = ()


def headings(names: str) -> tuple[str, ...]:
    """Columns from a line such as "module | chain | flatten gap"."""
    return tuple(names.split(" | "))


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by key, both in the order of first appearance."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
