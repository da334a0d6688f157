"""Sections on a terminal: within its width, with every name and figure in one piece."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from rich import table as rich_table
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from .layers import in_ascii
from .legend import legend
from .section import Section, Table

_WIDTH = 100  # of text and tables, at most
_GAP = 2  # between columns
_LONGEST = 48  # characters of a name on one line
_NAME, _PIECE = 36, 15  # characters of a cell, in the first column and in others, that are never folded


def print_sections(console: Console, sections: Iterable[Section]) -> None:
    """Prints the sections, each with the terms that it is the first to use; plots and folded tables are left out.

    Args:
        console: Where to; lines are as long as it is wide, and at most 100 characters.
        sections: In the order of reading. One whose table has no rows is passed over.
    """
    width = min(_WIDTH, console.width)
    drawn = in_ascii if console.options.ascii_only else str
    shown = [
        replace(section, table=section.table and _narrowed(_in_lines(section.table, drawn), width))
        for section in sections
        if section.table is None or section.table.rows
    ]
    said: set[str] = set()
    for at, section in enumerate(shown):
        if section.title:
            console.print(Text(("\n" if at else "") + section.title, "bold"), width=width)
        if section.text:
            console.print(Text(section.text.replace("\n", "\n\n")), width=width)
        for number, block in enumerate(_blocks(section.table, width) if section.table else ()):
            console.print(*([""] if number else []), block, sep="\n", width=width)
        terms = [words for words in legend([section], details=False).notes if words not in said]
        said.update(terms)
        for items in (section.notes, terms):
            notes = rich_table.Table.grid(padding=(0, 1))
            for words in items:
                notes.add_row("-", Text(words))
            if items:
                console.print(notes, width=width)


def _in_lines(table: Table, drawn: Callable[[str], str]) -> Table:
    """The table with names in its first column that are longer than half a screen broken at their dots, and all other
    cells as they are drawn."""
    return replace(table, rows=[(_broken(row[0]), *map(drawn, row[1:])) for row in table.rows])


def _broken(name: str) -> str:
    lines = [""]
    for part in re.findall(r"[^.]*\.|[^.]+$", name):
        if lines[-1] and cell_len(lines[-1] + part) > _LONGEST:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines) if cell_len(name) > _LONGEST else name


def _narrowed(table: Table, width: int) -> Table:
    """The table, without its minor columns where it is too wide."""
    if _fits(table, width):
        return table
    return table.keeping(n for n, column in enumerate(table.columns) if column not in table.minor)


def _blocks(table: Table, width: int) -> Iterator[rich_table.Table]:
    """The table, or where it is too wide several, with the first column in each."""
    left = list(range(1, len(table.columns)))
    while True:
        end = len(left)
        while end > 1 and not _fits(table.keeping((0, *left[:end])), width):
            end -= 1
        yield _drawn(table.keeping((0, *left[:end])), width)
        left = left[end:]
        if not left:
            return


def _fits(table: Table, width: int) -> bool:
    least = [low for low, _ in _widths(table)]
    return sum(least) + _GAP * (len(least) - 1) <= width


def _widths(table: Table) -> list[tuple[int, int]]:
    """(least, most) of each column: the longest piece that must not be folded, and the longest cell."""
    widths = []
    for at, heading in enumerate(table.columns):
        cells, piece = table.column(at), _NAME if at == 0 else _PIECE
        pieces = [part for c in cells for part in ([c] if cell_len(c) <= piece else c.split())]
        least = max(map(cell_len, ("-", *heading.split(), *pieces)))
        widths.append(
            (least, max(least, *map(cell_len, (heading, *(line for c in cells for line in c.splitlines())))))
        )
    return widths


def _drawn(table: Table, width: int) -> rich_table.Table:
    """Every column as wide as it must be; what is left goes to those that would fold, in equal parts."""
    bounds = _widths(table)
    wide = [least for least, _ in bounds]
    left = width - sum(wide) - _GAP * (len(wide) - 1)
    while left > 0 and (short := [n for n, (_, most) in enumerate(bounds) if wide[n] < most]):
        for n in short[:left]:
            wide[n] += 1
            left -= 1
    drawn = rich_table.Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for at, column in enumerate(table.columns):
        side = "right" if at and table.is_figures(at) else "left"
        drawn.add_column(Text(column), width=wide[at], justify=side, overflow="fold")  # type: ignore[arg-type]
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn
