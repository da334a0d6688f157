"""matplotlib's drawings as SVG, with text as text, in the colours of the page that they stand in."""

from io import StringIO
from typing import Any

INK = "#010203"  # stands for the text's colour until the SVG is written
# Both on white and on near-black.
COLOURS = ("#3b8ad9", "#e07b1a", "#2fa36b", "#a874d6", "#d8546a", "#8c8f94")
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
