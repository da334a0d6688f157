"""Two runs of the same benchmark, row by row: python -m benchmarks.compare BEFORE.json AFTER.json

Prints after over before for every row that both measured, the worst first, with the spread that the 20% and 80%
quantiles leave: a row is slower or faster where all of that lies on one side of 1. Rows that the first run timed and
the second did not come before all others, those of which only the second has a time (green) after them; they have no
ratio. Exit status 2, and one line, on files that do not compare: of two devices, or a smoke run and another, only with
--anyway.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dlr_lock import DLRError
from dlr_lock.reporting import Section, Table, headings, print_sections
from dlr_lock.reporting.words import cell, chain_name, count_words

from .schema import key, load

TIMES = {"kernels": "median_us", "models": "median_us", "training": "step_s"}


@dataclass(frozen=True, slots=True)
class Change:
    """after over before; low and high: with the quantiles that make it smallest and largest, None where a row has
    none. Without a ratio `only` says what became of the row (vanished, red or green) and `error` why it is red."""

    row: str
    ratio: float | None
    low: float | None = None
    high: float | None = None
    only: str = ""
    error: str | None = None

    @property
    def verdict(self) -> str:
        """vanished, red, slower, faster, green or, within the spread, same; empty where there is no spread."""
        if self.ratio is None:
            return self.only
        if self.low is None or self.high is None:
            return ""
        return "slower" if self.low > 1 else "faster" if self.high < 1 else "same"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--anyway", action="store_true", help="compare two devices, or a smoke run with another"
    )
    options = parser.parse_args(arguments)
    try:
        before, after = load(options.before), load(options.after)
        for name in ("device", "smoke"):
            if (before.get(name) or "") != (after.get(name) or "") and not options.anyway:
                raise DLRError(
                    f"{name} differs: {before.get(name)}, then {after.get(name)}; --anyway compares"
                )
        changes = compared(before, after)
    except DLRError as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    differences = [
        f"{name}: {before.get(name)}, then {after.get(name)}"
        for name in ("device", "driver", "program", "source", "versions")
        if before.get(name) != after.get(name)
    ]
    rows = [
        (
            cell(change.ratio, ".3f"), "" if change.low is None else f"{change.low:.2f} to {change.high:.2f}",
            change.verdict, change.row + (f": {change.error}" if change.error else ""),
        )
        for change in changes
    ]  # fmt: skip
    both = sum(change.only != "vanished" for change in changes)
    count = f"{both} rows compared, of {len(_timed(before))} and {len(_timed(after))} with a time"
    table = Table(headings("after / before | spread | verdict | row"), rows)
    print_sections(Console(highlight=False), [Section("", "\n".join(differences), table), Section("", count)])
    return 0


def compared(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """The changes, the worst first. Raises DLRError on documents that have no row in common."""
    kind = before["stage"]
    if kind != after["stage"]:
        raise DLRError(f"the files are of two kinds, {kind} and {after['stage']}")
    if kind not in TIMES:
        raise DLRError(f"a file of {kind} holds no times; compare {', '.join(TIMES)}")
    then, now = ({key(row, kind): row for row in document["rows"]} for document in (before, after))
    if not then.keys() & now.keys():
        raise DLRError("the files have no row in common")
    time = TIMES[kind]
    changes = []
    for name, old in then.items():
        words, new = _words(old, kind), now.get(name)
        if new is None:
            if old[time]:
                changes.append(Change(words, None, only="vanished"))
        elif old[time] and new[time]:
            bounds = (None, None)
            if old.get("p20_us") and new.get("p20_us"):
                bounds = (new["p20_us"] / old["p80_us"], new["p80_us"] / old["p20_us"])
            changes.append(Change(words, new[time] / old[time], *bounds))
        elif old[time]:
            why = new["error_message"] or f"error {new['error']} over {new['error_limit']}"
            changes.append(Change(words, None, only="red", error=why))
        elif new[time]:
            changes.append(Change(words, None, only="green"))
    order = {"red": 0, "vanished": 1, "": 2, "green": 3}
    return sorted(changes, key=lambda change: (order[change.only], -(change.ratio or 0)))


def _timed(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in document["rows"] if row.get(TIMES[document["stage"]])]


def _words(row: dict[str, Any], kind: str) -> str:
    chain, tokens = chain_name(row), count_words(row["tokens"], "token")
    if kind == "kernels":
        return f"{row['provider']}, MLP {row['hidden']}x{row['intermediate']} as {chain}, {tokens}"
    if kind == "models":
        return f"{row['side']} {row['model']} as {chain}, {row['phase']} of {tokens}, {row['engine']}"
    return f"{row['side']} {row['model']} as {chain}, {row['strategy']}, {tokens}"


if __name__ == "__main__":
    sys.exit(main())
