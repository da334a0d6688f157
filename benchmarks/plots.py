"""One picture a device: the times of chains over what they replace, against tokens; matplotlib draws it.

The first line of a picture names the files that it was drawn from, with their SHA-256 and that of the rest of itself: a
picture of other files, or one edited by hand, is found out without matplotlib.
"""

import hashlib
from itertools import cycle
from pathlib import Path
from typing import Any

from dlr_lock.common.files import write_whole
from dlr_lock.reporting.svg import COLOURS, INK, style, svg_of
from dlr_lock.reporting.words import chain_name

from .output import folder
from .tables import kernel_cases, model_steps, over

Documents = dict[str, dict[str, Any]]  # kind to a run that was loaded, with its `path`
Lines = dict[tuple[str, str], list[tuple[int, float]]]  # (chain, phase of a model's step) to (tokens, ratio)

NEEDED = "plots are left as they are, for drawing them needs matplotlib: pip install 'dlr-lock[report]'"
_DRAWN = ("kernels", "models")
_MARKS = "os^Dv*"  # they tell lines apart where colours do not
# A reader's browser says whether it is dark. GitHub's own setting may differ from it, so the ground is drawn as well.
_STYLE = (
    "svg{color:#1f2328;background:#ffffff}"
    "@media(prefers-color-scheme:dark){svg{color:#d1d7e0;background:#0d1117}}"
)


def picture(documents: Documents) -> Path | None:
    """Where the picture of a device's newest runs is to be, None where they have nothing to draw."""
    if not _panels(documents):
        return None
    run = next(documents[kind] for kind in _DRAWN if kind in documents)
    own = folder(run["device"]).name  # a folder may hold the files of several devices
    return run["path"].with_name("times.svg" if run["path"].parent.name == own else f"times-{own}.svg")


def is_current(path: Path, documents: Documents) -> bool:
    """Whether a picture is there and is as it was drawn, from these very files."""
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    return text == _stamped(text.partition("\n")[2], documents)


def draw(path: Path, documents: Documents) -> None:
    """Writes the picture, the same bytes for the same files with one version of matplotlib; ImportError without it."""
    text = _svg(documents)
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8", newline="\n"))


def _stamped(svg: str, documents: Documents) -> str:
    # Digests of text, not of bytes: a checkout may have its own ends of lines.
    paths = [documents[kind]["path"] for kind in _DRAWN if kind in documents]
    named = [(path.name, path.read_text(encoding="utf-8")) for path in paths]
    parts = [
        f"{name} {hashlib.sha256(text.encode()).hexdigest()}" for name, text in (*named, ("below:", svg))
    ]
    return f"<!-- drawn from {', '.join(parts)} -->\n{svg}"


def _panels(documents: Documents) -> dict[str, Lines]:
    """Title to lines: a panel an MLP, and one of whole models. A row whose gate is red is no point."""
    points = []
    for dense, _, ours in kernel_cases(documents["kernels"]) if "kernels" in documents else ():
        title = f"MLP {ours['hidden']} x {ours['intermediate']}, {ours['dtype']}"
        points.append((title, (chain_name(ours), ""), ours["tokens"], over(ours, dense)))
    for _, ours, ratio in model_steps(documents["models"]) if "models" in documents else ():
        line = (f"{ours['model']} {chain_name(ours)}", ours["phase"])
        points.append((f"Whole models, {ours['dtype']}; dashed: decode", line, ours["tokens"], ratio))
    panels: dict[str, Lines] = {}
    for title, line, tokens, ratio in points:
        if ratio is not None:
            panels.setdefault(title, {}).setdefault(line, []).append((tokens, ratio))
    return panels


def _svg(documents: Documents) -> str:
    from matplotlib.figure import Figure

    sizes = {"font_size": 10, "axes_titlesize": 10, "figure_titlesize": 11, "legend_fontsize": 9}
    panels = _panels(documents)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with style("dlr-lock", lines_markersize=4.5, **sizes):
        figure = Figure(figsize=(4.6 * columns if columns > 1 else 6.4, 4.1 * rows), layout="constrained")
        figure.suptitle(_heading(documents))
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.08)
        first = None
        for at, (title, lines) in enumerate(panels.items(), start=1):
            models = any(phase for _, phase in lines)
            axes = figure.add_subplot(rows, columns, at, sharey=None if models else first)
            first = first or axes
            _draw(axes, title, lines, models)
        return _stamped(svg_of(figure, _STYLE), documents)


def _draw(axes: Any, title: str, lines: Lines, models: bool) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    chains = dict.fromkeys(chain for chain, _ in lines)
    looks = dict(zip(chains, cycle(zip(COLOURS, _MARKS, strict=True)), strict=False))
    axes.axhline(1, color=INK, linewidth=1)
    for (chain, phase), points in lines.items():
        colour, mark = looks[chain]
        stroke = "--" if phase == "decode" else "-"
        axes.plot(*zip(*sorted(points), strict=True), stroke, marker=mark, color=colour)
    for chain, (colour, mark) in looks.items():
        axes.plot([], [], marker=mark, color=colour, label=chain)
    axes.set(title=title, xlabel="tokens", xscale="log", yscale="log")
    axes.set_ylabel("time of locked / original" if models else "time of chain / MLP")
    axes.set_xticks(sorted({tokens for points in lines.values() for tokens, _ in points}))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.legend(
        title="model and chain: lanes x steps x rank" if models else "chain: lanes x steps x rank",
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=2 if models else 3,
    )


def _heading(documents: Documents) -> str:
    runs = [documents[kind] for kind in _DRAWN if kind in documents]
    dates = " and ".join(dict.fromkeys(run["date"][:10] for run in runs))
    device = runs[0]["device"]
    name = f"{device.removeprefix('CPU ')} (CPU)" if device.startswith("CPU ") else device
    return f"{name}, {dates}\nBelow the line at 1 a chain is faster than what it replaces"
