"""What a result file holds, checked wherever one is read: so a table is never made of what no run has written.

A document is one run of one kind (the beginning of its file's name): a head of HEAD's fields, more that is free, and
`rows`, each with the fields of its kind's dataclass; those with a default may be missing. A row with a gate
(`accurate`) has times only where it is open. SCHEMA grows when an old file would be misread.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from dlr_lock import DLRError
from dlr_lock.runtime.bench import Row
from dlr_lock.runtime.files import read_json

from .gpu.rows import ConversionRow, FactRow, ModelRow, ProfileRow, SuiteRow, TrainingRow

SCHEMA = 1
KINDS: dict[str, type] = {
    "machine": FactRow,
    "tests": SuiteRow,
    "kernels": Row,
    "models": ModelRow,
    "profiles": ProfileRow,
    "training": TrainingRow,
    "conversion": ConversionRow,
}
HEAD: dict[str, Any] = {
    "schema": int,
    "device": str,
    "driver": str | None,
    "cpu_threads": int,
    "program": str,
    "versions": dict,
    "date": str,
    "stopped": str | None,
    "rows": list,
}
# The head's fields that `make gpu` adds.
STAGE: dict[str, Any] = {
    "stage": str,
    "source": str,
    "smoke": bool,
    "finished": bool,
    "seconds": float,
    "options": dict,
}
_TIMES = ("median_us", "p20_us", "p80_us", "ratio_to_dense", "ratio_to_original", "step_s")
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")


def kind_of(path: Path) -> str | None:
    """The kind that a file's name begins with, None where it is none of ours."""
    found = re.fullmatch(r"([a-z]+)-\d{8}T\d{6}\.json", path.name)
    return found[1] if found and found[1] in KINDS else None


def load(path: Path) -> dict[str, Any]:
    """A result file, with the fields that its rows leave out filled in.

    Raises DLRError, naming the field, where it is not what a run writes.
    """
    document = read_json(path)
    kind = document.get("stage") or kind_of(path)
    if kind not in KINDS:
        raise DLRError(f"{path.name} is no result: its name begins with none of {', '.join(KINDS)}")
    for fault in faults(document, kind):
        raise DLRError(f"{path.name}: {fault}")
    rest = {f.name: f.default for f in fields(KINDS[kind]) if f.default is not MISSING}
    return document | {"stage": kind, "rows": [rest | row for row in document["rows"]]}


def faults(document: dict[str, Any], kind: str) -> Iterator[str]:
    """What is wrong with a document of a kind, one line each."""
    if document.get("schema") != SCHEMA:
        yield f"schema {document.get('schema')!r} is not {SCHEMA}, which this program reads"
        return
    head = HEAD | (STAGE if "stage" in document else {})
    for name, wanted in head.items():
        if name not in document:
            yield f"{name} is missing"
        elif not _is(document[name], wanted):
            yield f"{name} is {document[name]!r}"
    if not _DATE.match(str(document.get("date"))):
        yield f"date is {document.get('date')!r}, not as in 2026-11-21T09:48:46+00:00"
    rows = document.get("rows")
    for number, row in enumerate(rows if isinstance(rows, list) else []):
        for fault in _row_faults(row, kind):
            yield f"row {number}: {fault}"


def key(row: dict[str, Any], kind: str) -> tuple[Any, ...]:
    """What tells a row from the others of its kind."""
    return tuple(row[f.name] for f in fields(KINDS[kind]) if _is_required(f))


def _row_faults(row: Any, kind: str) -> Iterator[str]:
    if not isinstance(row, dict):
        yield f"{row!r} is no row"
        return
    known = {f.name: f for f in fields(KINDS[kind])}
    for name, field in known.items():
        if name not in row:
            if _is_required(field):
                yield f"{name} is missing"
        elif not _is(row[name], field.type):
            yield f"{name} is {row[name]!r}"
    for name in row:
        if name not in known:
            yield f"{name} is not known"
    if row.get("accurate") is False:
        for name in _TIMES:
            if row.get(name) is not None:
                yield f"{name} is given, though the row is not accurate"


def _is_required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _is(value: Any, wanted: Any) -> bool:
    """Whether a value is of a type; a whole number is a float, too, and true is no number."""
    if isinstance(value, bool):
        return isinstance(True, wanted) and wanted not in (int, float, int | None, float | None)
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, wanted) or (isinstance(value, int) and isinstance(float(value), wanted))
