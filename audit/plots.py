"""The curves of an audit as SVG within its page; matplotlib draws them, where it is installed."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from itertools import cycle
from typing import Any

from .report import AuditReport, Run, cheapest_step
from .svg import COLOURS, INK, style, svg_of
from .words import grouped, start_loss

_NO_PLOTS = "Curves need pip install 'dlr-lock[report]'; their values are in the table of every run."
# An variant has a colour, an attack one of these and a mark.
_STROKES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))


def student_plot(report: AuditReport) -> str:
    """Error of the students over the chain's, against train_tokens: a line for each module and start."""
    students = [c for m in report.modules for c in m.students]
    colours = dict(zip(dict.fromkeys(c.init for c in students), cycle(COLOURS), strict=False))

    def draw(axes: Any) -> list[Any]:
        from matplotlib.ticker import LogLocator, NullLocator

        for m in report.modules:
            for init, same in grouped(
                sorted(m.students, key=lambda c: c.train_tokens), lambda c: c.init
            ).items():
                ratios = [c.error / m.chain_error for c in same]
                axes.plot([c.train_tokens for c in same], ratios, marker="o", color=colours[init], alpha=0.8)
        axes.axhline(1, color=INK, linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel="train_tokens", ylabel="copy's error / chain's")
        axes.set_xticks(sorted({c.train_tokens for c in students}))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        return [_key(f"{init} initialisation", color=colour) for init, colour in colours.items()]

    words = "A line is a module; below the dashed level its copy is better than the chain itself."
    plots = _plots([("students", "students' errors against train_tokens", draw)])
    return f'{plots}<p class="quiet">{words}</p>\n' if students else ""


def gain_plots(report: AuditReport) -> str:
    """Gain of the runs at their best rates, the mean over seeds and its band, against tokens, FLOPs and seconds."""
    start = start_loss(report)
    curves = grouped((run for run in report.runs if run.best), lambda r: (r.variant, r.attack))
    if start is None or not curves:
        return ""
    variants = {
        variant: COLOURS[at % len(COLOURS)]
        for at, variant in enumerate(dict.fromkeys(variant for variant, _ in curves))
    }
    attacks = {
        attack: _STROKES[at % len(_STROKES)]
        for at, attack in enumerate(dict.fromkeys(attack for _, attack in curves))
    }

    def draw(label: str, cost: Callable[[Run], float | None], axes: Any) -> list[Any]:
        """cost: of one token of a run."""
        for (variant, attack), runs in curves.items():
            if (each := cost(runs[0])) is None:
                continue
            gains = [[start - loss for loss in run.losses] for run in runs]
            # Where a seed diverged the mean ends: that of the others would be of fewer runs than it says.
            points = list(zip(*gains, strict=False))
            x = [n * each for n in runs[0].tokens[: len(points)]]
            line, mark = attacks[attack]
            axes.plot(x, [sum(p) / len(p) for p in points], line, marker=mark, color=variants[variant])
            axes.fill_between(
                x,
                [min(p) for p in points],
                [max(p) for p in points],
                color=variants[variant],
                alpha=0.2,
                lw=0,
            )
        for loss in dict.fromkeys(v.loss for v in report.verdicts):
            axes.axhline(start - loss, color=INK, linewidth=0.8, linestyle="--")
        axes.set(xlabel=label, ylabel="gain, nats a token")
        return [
            *(_key(variant, color=colour) for variant, colour in variants.items()),
            *(
                _key(attack, color=INK, linestyle=line, marker=mark)
                for attack, (line, mark) in attacks.items()
            ),
        ]

    costs: dict[str, Callable[[Run], float | None]] = {
        "tokens": lambda run: 1,
        "FLOPs": lambda run: _token_cost(report, run, "flops"),
        "seconds": lambda run: _token_cost(report, run, "seconds"),
    }
    plots = _plots(
        [
            (f"gain-{label}", f"gain against {label}", partial(draw, label, cost))
            for label, cost in costs.items()
        ]
    )
    return (
        f'{plots}<p class="quiet">Colour: variant; stroke and mark: attack; band: least to most over seeds; dashed levels: '
        "the verdicts' targets. FLOPs and seconds are those of each attack's cheapest strategy; what an redistillation took "
        "before is not in the curves, but in the verdicts.</p>\n"
    )


def _token_cost(report: AuditReport, run: Run, measure: str) -> float | None:
    """The cheapest strategy's cost of a token, None where no step was measured."""
    step = cheapest_step(report.steps, run.variant, run.attack, measure)
    return None if step is None else getattr(step, measure) / step.tokens


def _key(label: str, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **style)


def _plots(plots: Sequence[tuple[str, str, Callable[[Any], list[Any]]]]) -> str:
    """Drawings side by side, each (name, what it shows, draw); draw puts lines on axes and gives the legend."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return f'<p class="quiet">{escape(_NO_PLOTS)}</p>\n'
    drawn = "".join(f'<div class="plot">{_svg(*plot)}</div>\n' for plot in plots)
    return f'<div class="plots">\n{drawn}</div>\n'


def _svg(name: str, what: str, draw: Callable[[Any], list[Any]]) -> str:
    """An <svg> with text as text, in the page's own text colour, whose ids no other drawing has."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    with style(name, font_size=11, lines_markersize=4):
        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.add_subplot()
        handles = draw(axes)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=10)
        svg = svg_of(figure, ".plot ")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(what)}"', 1)
