"""Sections and tables as Markdown, for a model card and for the tables of benchmarks."""

from collections.abc import Iterable, Sequence

from .legend import legend
from .section import Section, Table


def markdown(sections: Iterable[Section], level: int = 2) -> str:
    """The sections and their terms as Markdown, folded tables in full; plots are left out.

    Args:
        sections: In the order of reading.
        level: Of their headings, 2 for "##".
    """
    sections = list(sections)
    lines: list[str] = []
    for section in (*sections, legend(sections)):
        lines += [f"{'#' * level} {section.title}", ""] if section.title else []
        for words in section.text.splitlines():
            lines += [words, ""]
        for part in (section.table, *section.details):
            lines += [] if part is None or not part.rows else table(part)
        lines += [*(f"- {words}" for words in section.notes), ""] if section.notes else []
    return "\n".join(lines).rstrip("\n")


def table(part: Table) -> list[str]:
    """The lines of a table and an empty one; columns are right-aligned, but for the first and those of `left`."""
    left = {part.columns[0], *part.left}
    rule = f"|{'|'.join('---' if column in left else '---:' for column in part.columns)}|"
    return [_line(part.columns), rule, *map(_line, part.rows), ""]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
