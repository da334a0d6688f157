"""Figures of a model's modules drawn over its layers, in characters, for a terminal and a page on the hub alike."""

import math
from collections.abc import Sequence

from .lock_verdict import LOCKED_GAP
from .section import Section, Table

_BLOCKS = ("", *"▏▎▍▌▋▊▉")  # eighths of a character's width
_LONGEST = 16  # characters
_LEAST_GAP = (
    LOCKED_GAP / 5
)  # flatten gaps run from 0.5 to some hundreds: they are drawn in logarithms from here up


def over_layers(modules: Sequence[tuple[str, float, float]]) -> list[Section]:
    """Relative error and flatten gap of each module, drawn; no section for a module alone.

    Args:
        modules: Name, relative error and flatten gap, in model order.
    """
    if len(modules) < 2:
        return []
    errors, gaps = [error for _, error, _ in modules], [gap for _, _, gap in modules]
    lengths = [math.log(max(gap, _LEAST_GAP) / _LEAST_GAP) for gap in gaps]
    rows = [
        (name, bar(error, max(errors)), f"{error:.4f}", bar(length, max(lengths)), f"{gap:.2f}")
        for (name, error, gap), length in zip(modules, lengths, strict=True)
    ]
    columns = ("module", "error, drawn", "relative error", "gap, drawn", "flatten gap")
    return [
        Section(
            "Over the layers",
            f"Gaps are drawn in logarithms, from {_LEAST_GAP:g} up.",
            Table(columns, rows, left=(columns[1], columns[3])),
        )
    ]


def bar(value: float, longest: float) -> str:
    """A bar of up to 16 characters, as long beside the longest as a value is beside that one's."""
    share = min(1.0, value / longest) if value > 0 and longest > 0 else 0.0
    whole, eighth = divmod(round(8 * _LONGEST * share), 8)
    return "█" * whole + _BLOCKS[eighth]


def in_ascii(cell: str) -> str:
    """A cell for a terminal that has no blocks: a bar in number signs, in whole characters."""
    return cell.translate(str.maketrans("█", "#", "".join(_BLOCKS)))
