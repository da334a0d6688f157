"""Numbers in words: one form for FLOPs, seconds, bytes, rates and ratios wherever they are printed."""

from collections.abc import Callable, Mapping
from typing import Any


def flops_words(value: float) -> str:
    """Such as 2.73 PFLOP."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g} {unit}FLOP"
        value /= 1000
    return f"{value:,.3g} EFLOP"


def seconds_words(value: float) -> str:
    """Such as 12.5 s, 93.6 min or 3.2 h."""
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:,.3g} h"


def bytes_words(value: float) -> str:
    """Such as 512 bytes or 581.7 MiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:,.4g} GiB"


def rate_words(value: float) -> str:
    """A learning rate, such as 3.2e-4 or 1e-6."""
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def ratio_words(value: float | None, bound: bool = False) -> str:
    """A ratio in a cell; bound: it is a lower bound."""
    return f"{'more than ' if bound else ''}{cell(value, '.3g')}"


def cell(value: Any, form: str | Callable[[Any], str] = "", none: str = "-") -> str:
    """A value in a table.

    Args:
        value: What is shown.
        form: As `format` takes it, or what words the value.
        none: What stands for None.
    """
    if value is None:
        return none
    return form(value) if callable(form) else format(value, form)


def count_words(count: int, what: str) -> str:
    """Such as 1 token or 4,096 tokens."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def chain_name(row: Mapping[str, Any]) -> str:
    """Lanes x steps x rank, such as 1x12x192; see `legend.TERMS`."""
    return f"{row['lanes']}x{row['depth']}x{row['rank']}"
