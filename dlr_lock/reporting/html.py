"""Sections as one HTML document that loads nothing, runs nothing and fits a phone."""

import re
from collections.abc import Iterable, Sequence
from html import escape

from . import svg
from .legend import legend
from .section import Section, Table

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
.head { background: var(--soft); border-left: 4px solid #d9730d; padding: .25rem 1rem; }
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
_SHORT = 16  # characters of a cell that stay on one line


def document(head: Section, sections: Iterable[Section]) -> str:
    """The document; the same sections give the same characters, with one version of matplotlib.

    Args:
        head: Its title is the document's, its text stands out above all else.
        sections: What follows, each with a link to it, and then the terms of all.
    """
    parts = list(sections)
    parts += [terms] if (terms := legend(parts)).notes else []
    nav = " · ".join(f'<a href="#{_anchor(part.title)}">{escape(part.title)}</a>' for part in parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(head.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(head.title)}</h1>\n<div class="head">\n{_paragraphs(head.text)}</div>\n'
        f'<p class="quiet">{nav}</p>\n{"".join(map(_section, parts))}</main>\n</body>\n</html>\n'
    )


def _section(section: Section) -> str:
    items = "".join(f"<li>{escape(note)}</li>\n" for note in section.notes)
    return "".join(
        (
            f'<h2 id="{_anchor(section.title)}">{escape(section.title)}</h2>\n{_paragraphs(section.text)}',
            _table(section.table) if section.table else "",
            f"<ul>\n{items}</ul>\n" if items else "",
            svg.drawn(section.plots) if section.plots else "",
            _paragraphs(section.caption, quiet=True) if section.plots else "",
            *(
                f"<details><summary>{escape(part.title)} ({len(part.rows)})</summary>\n{_table(part)}</details>\n"
                for part in section.details
                if part.rows
            ),
        )
    )


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower())


def _paragraphs(text: str, quiet: bool = False) -> str:
    kind = " class=quiet" if quiet else ""
    return "".join(f"<p{kind}>{escape(words)}</p>\n" for words in text.splitlines())


def _table(table: Table) -> str:
    """Figures stand to the right, short words in one piece; a wide table scrolls by itself."""
    if not table.rows:
        return _paragraphs(table.empty, quiet=True)
    kinds = []
    for at in range(len(table.columns)):
        short = " class=k" if max(map(len, table.column(at))) <= _SHORT else ""
        kinds.append(" class=n" if table.is_figures(at) else short)

    def line(tag: str, cells: Sequence[str]) -> str:
        put = (f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(put)}</tr>\n"

    body = "".join(line("td", row) for row in table.rows)
    head = line("th", table.columns)
    return f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'
