"""Two runs of the same benchmark, row by row: python -m benchmarks.compare BEFORE.json AFTER.json

Prints after over before for every row that both measured, the worst first, with the spread that the 20% and 80%
quantiles leave: a row is slower or faster where all of that lies on one side of 1. Rows whose error gate the second run
does not pass come before all others, and have no ratio. Exit status 2, and one line, on files that do not compare.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dlr_lock import DLRError

from .schema import key, load

TIMES = {"kernels": "median_us", "models": "median_us", "training": "step_s"}


@dataclass(frozen=True, slots=True)
class Change:
    """after over before; low and high: with the quantiles that make it smallest and largest, None where a row has
    none; error: why the second run has no time for it."""

    row: str
    ratio: float | None
    low: float | None = None
    high: float | None = None
    error: str | None = None

    @property
    def verdict(self) -> str:
        """red, slower, faster or, within the spread, same; empty where there is no spread."""
        if self.ratio is None:
            return "red"
        if self.low is None or self.high is None:
            return ""
        return "slower" if self.low > 1 else "faster" if self.high < 1 else "same"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    screen = Console(highlight=False)
    try:
        before, after = load(options.before), load(options.after)
        changes = compared(before, after)
    except DLRError as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    for name in ("device", "driver", "program", "source", "versions"):
        if before.get(name) != after.get(name):
            screen.print(f"{name}: {before.get(name)}, then {after.get(name)}", markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, side in (("after / before", "right"), ("spread", "left"), ("", "left"), ("row", "left")):
        table.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
    for change in changes:
        spread = "" if change.low is None else f"{change.low:.2f} to {change.high:.2f}"
        ratio = "-" if change.ratio is None else f"{change.ratio:.3f}"
        table.add_row(
            ratio, spread, change.verdict, change.row + (f": {change.error}" if change.error else "")
        )
    screen.print(table)
    counts = [(len(_timed(document)), document) for document in (before, after)]
    screen.print(f"{len(changes)} rows compared, of {counts[0][0]} and {counts[1][0]}")
    return 0


def compared(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """The changes, the worst first. Raises DLRError on documents that have no row in common."""
    kind = before["stage"]
    if kind != after["stage"]:
        raise DLRError(f"the files are of two kinds, {kind} and {after['stage']}")
    if kind not in TIMES:
        raise DLRError(f"a file of {kind} holds no times; compare {', '.join(TIMES)}")
    then = {key(row, kind): row for row in _timed(before)}
    changes = []
    for row in after["rows"]:
        old = then.get(key(row, kind))
        if old is None:
            continue
        words = _words(row, kind)
        if not row.get(TIMES[kind]):
            why = row["error_message"] or f"error {row.get('error')} over {row.get('error_limit')}"
            changes.append(Change(words, None, error=why))
            continue
        ratio = row[TIMES[kind]] / old[TIMES[kind]]
        bounds = (None, None)
        if old.get("p20_us") and row.get("p20_us"):
            bounds = (row["p20_us"] / old["p80_us"], row["p80_us"] / old["p20_us"])
        changes.append(Change(words, ratio, *bounds))
    if not changes:
        raise DLRError("the files have no row in common")
    return sorted(changes, key=lambda change: -(float("inf") if change.ratio is None else change.ratio))


def _timed(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in document["rows"] if row.get(TIMES[document["stage"]])]


def _words(row: dict[str, Any], kind: str) -> str:
    chain = f"{row['lanes']}x{row['depth']}x{row['rank']}"
    tokens = f"{row['tokens']} token{'s' if row['tokens'] > 1 else ''}"
    if kind == "kernels":
        return f"{row['provider']}, MLP {row['hidden']}x{row['intermediate']} as {chain}, {tokens}"
    if kind == "models":
        return f"{row['side']} {row['model']} as {chain}, {row['phase']} of {tokens}, {row['engine']}"
    return f"{row['side']} {row['model']} as {chain}, {row['policy']}, {tokens}"


if __name__ == "__main__":
    sys.exit(main())
