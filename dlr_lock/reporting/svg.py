"""Plots as SVG, with text as text, in the colours of the page that they stand in; matplotlib draws them."""

import re
from collections.abc import Collection, Sequence
from html import escape
from io import StringIO
from itertools import cycle
from typing import Any

from .section import Plot

INK = "#010203"  # stands for the text's colour until the SVG is written
# Both on white and on near-black.
COLOURS = ("#3b8ad9", "#e07b1a", "#2fa36b", "#a874d6", "#d8546a", "#8c8f94")
_LINES, _MARKS = ("-", "--", ":", "-."), "os^DvP*"  # 28 pairs before the first comes again
_NO_PLOTS = "Curves need pip install 'dlr-lock[report]'; their values are in the tables."
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "text.parse_math": False, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#888888", "grid.alpha": 0.25,
    "legend.frameon": False,
}  # fmt: skip


def style(salt: str, **more: Any) -> Any:
    """The context to draw in. salt: what ids in the SVG are made from; more: matplotlib's settings, '_' for '.'."""
    import matplotlib.style

    own = {name.replace("_", ".", 1): value for name, value in more.items()}
    return matplotlib.style.context(["default", _STYLE, {"svg.hashsalt": salt}, own])


def svg_of(figure: Any, rules: str) -> str:
    """The <svg> of a figure, the same bytes for the same drawing. rules: CSS or a selector, put before its rule of
    everything ('*')."""
    out = StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", transparent=True, metadata=no_metadata)
    svg = out.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor").replace(">*{", f">{rules}*{{")


def drawn(plots: Sequence[Plot]) -> str:
    """Plots side by side as HTML, or a sentence about what is missing where there is no matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return f'<p class="quiet">{escape(_NO_PLOTS)}</p>\n'
    return f'<div class="plots">\n{"".join(map(_drawn, plots))}</div>\n'


def _apart(values: Collection[float]) -> list[float]:
    """Those of the values, ascending, whose labels fit beside one another on a logarithmic axis: 8 at most."""
    ordered = sorted(values)
    gap = (ordered[-1] / ordered[0]) ** (1 / 8) if ordered and ordered[0] > 0 else 1.0
    kept: list[float] = []
    for value in ordered:
        if not kept or value >= gap * kept[-1]:
            kept.append(value)
    return kept


def _drawn(plot: Plot) -> str:
    """An <svg> with text as text, in the page's own text colour, whose ids no other drawing has."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    name = re.sub(r"\W+", "-", plot.title)
    colours = dict(zip(dict.fromkeys(c.colour for c in plot.curves), cycle(COLOURS), strict=False))
    strokes = dict(
        zip(dict.fromkeys(c.stroke for c in plot.curves), zip(cycle(_LINES), cycle(_MARKS)), strict=False)
    )
    with style(name, font_size=11, lines_markersize=4):
        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.add_subplot()
        for c in plot.curves:
            line, mark = strokes[c.stroke]
            axes.plot(c.x, c.y, line, marker=mark, color=colours[c.colour])
            if c.band:
                axes.fill_between(c.x, *c.band, color=colours[c.colour], alpha=0.2, lw=0)
        for level in plot.levels:
            axes.axhline(level, color=INK, linewidth=0.8, linestyle="--")
        axes.set(xlabel=plot.x_label, ylabel=plot.y_label)
        if plot.log:
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(_apart({x for c in plot.curves for x in c.x}))
            low, high = axes.get_ylim()
            close = high / low < 20  # as far as labels at 1.5 and 7 do not run into those beside them
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if close else (1,)))
            axes.yaxis.set_major_formatter(EngFormatter(sep="") if low >= 1 and high >= 1000 else "{x:g}")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        key = [Line2D([], [], label=label, color=colour) for label, colour in colours.items()]
        key += [
            Line2D([], [], label=label, color=INK, linestyle=line, marker=mark)
            for label, (line, mark) in strokes.items()
            if label
        ]
        figure.legend(handles=key, loc="outside lower center", ncols=3, fontsize=10)
        svg = svg_of(figure, ".plot ")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(plot.title)}"', 1)
    return f'<div class="plot">{svg}</div>\n'
