"""What a result file holds, checked wherever one is read: so a table is never made of what no run has written.

A document is one run of one kind (the beginning of its file's name): a head of HEAD's fields, more that is free, and
`rows`, each with the fields of its kind's dataclass; those with a default may be missing. A row of a kind with a gate
(`accurate`) has times only where the gate is open. SCHEMA grows when an old file would be misread.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from dlr_lock import DLRError
from dlr_lock.common.files import read_json
from dlr_lock.compare.bench import SpeedRow
from dlr_lock.microbench.bench import Row

from .gpu.rows import (
    ConversionRow,
    FactRow,
    HostRow,
    ModelRow,
    ProductsRow,
    ProfileRow,
    SuiteRow,
    TrainingRow,
)

SCHEMA = 1
KINDS: dict[str, type] = {
    "machine": FactRow,
    "tests": SuiteRow,
    "kernels": Row,
    "models": ModelRow,
    "speed": SpeedRow,
    "profiles": ProfileRow,
    "training": TrainingRow,
    "conversion": ConversionRow,
    "moretests": SuiteRow,
    "host": HostRow,
    "fidelity-products": ProductsRow,
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
    "settings": dict,
}
# What only a row that is accurate has, and all rates and times that are above 0.
TIMES = (
    "median_us", "p20_us", "p80_us", "tokens_per_s", "gb_per_s", "copy_percent", "tflop_per_s", "matmul_percent",
    "ratio_to_dense", "ratio_to_original", "forward_s", "backward_s", "update_s", "step_s", "decode_ratio",
    "prefill_ratio",
)  # fmt: skip
_SIZES = (
    "hidden",
    "intermediate",
    "layers",
    "lanes",
    "depth",
    "rank",
    "batch",
    "prompt",
    "new_tokens",
    "tokens",
    "train_tokens",
)
_SIGNED = ("value", "kl", "loss", "original_loss")  # of all numbers, those that may be below 0
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")


def kind_of(path: Path) -> str | None:
    """The kind that a file's name begins with, None where it is none of ours."""
    found = re.fullmatch(r"([a-z-]+)-\d{8}T\d{6}\.json", path.name)
    return found[1] if found and found[1] in KINDS else None


def load(path: Path) -> dict[str, Any]:
    """A result file, with the fields that its rows leave out filled in.

    Raises DLRError, naming the field, where it is not what a run writes.
    """
    try:
        document = read_json(path)
    except RecursionError:
        raise DLRError(f"{path} cannot be read as JSON: it is nested too deeply") from None
    named = kind_of(path)
    kind = document.get("stage", named)
    if not isinstance(kind, str) or kind not in KINDS:
        raise DLRError(f"{path.name} is no result: its name begins with none of {', '.join(KINDS)}")
    if named not in (None, kind):
        raise DLRError(f"{path.name}: stage is {kind!r}, though its name begins with {named}")
    for fault in faults(document, kind):
        raise DLRError(f"{path.name}: {fault}")
    rest = {
        f.name: f.default_factory() if f.default_factory is not MISSING else f.default
        for f in fields(KINDS[kind])
        if not _is_required(f)
    }
    return document | {"stage": kind, "rows": [rest | row for row in document["rows"]]}


def faults(document: dict[str, Any], kind: str) -> Iterator[str]:
    """What is wrong with a document of a kind, one line each."""
    if document.get("schema") != SCHEMA:
        yield f"schema {_short(document.get('schema'))} is not {SCHEMA}, which this program reads"
        return
    head = HEAD | (STAGE if "stage" in document else {}) | ({"settings": dict} if kind == "kernels" else {})
    for name, wanted in head.items():
        if name not in document:
            yield f"{name} is missing"
        elif not _is(document[name], wanted):
            yield f"{name} is {_short(document[name])}"
    if not _DATE.match(str(document.get("date"))):
        yield f"date is {_short(document.get('date'))}, not as in 2026-11-21T09:48:46+00:00"
    rows = document.get("rows")
    seen: dict[tuple[Any, ...], int] = {}
    for number, row in enumerate(rows if isinstance(rows, list) else []):
        wrong = list(_row_faults(row, kind))
        if not wrong and (first := seen.setdefault(key(row, kind), number)) != number:
            wrong = [f"the same as row {first}"]
        for fault in wrong:
            yield f"row {number}: {fault}"


def key(row: dict[str, Any], kind: str) -> tuple[Any, ...]:
    """What tells a row from the others of its kind."""
    return tuple(row[f.name] for f in fields(KINDS[kind]) if _is_required(f))


def _row_faults(row: Any, kind: str) -> Iterator[str]:
    if not isinstance(row, dict):
        yield f"{_short(row)} is no row"
        return
    known = {f.name: f for f in fields(KINDS[kind])}
    for name, field in known.items():
        if name not in row:
            if _is_required(field):
                yield f"{name} is missing"
        elif not _is(row[name], field.type):
            yield f"{name} is {_short(row[name])}"
        elif isinstance(row[name], int | float) and (
            (row[name] < 0 and name not in _SIGNED) or (row[name] == 0 and name in TIMES + _SIZES)
        ):
            yield f"{name} is {row[name]}"
    for name in row:
        if name not in known:
            yield f"{_short(name)} is not known"
    if "accurate" not in known:
        return
    if row.get("accurate") is not True:
        for name in TIMES:
            if row.get(name) is not None:
                yield f"{name} is given, though the row is not accurate"
        return
    error, limit = row.get("error"), row.get("error_limit")
    if _is(error, float) and _is(limit, float) and error > limit:
        yield f"accurate, though the error {error:.1e} is over {limit:.1e}"


def _short(value: Any) -> str:
    """The value in one line that is not long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits
        return "too long"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _is(value: Any, wanted: Any) -> bool:
    """Whether a value is of a type; a whole number is a float, too, and true is no number."""
    if isinstance(value, bool):
        return isinstance(True, wanted) and wanted not in (int, float, int | None, float | None)
    if isinstance(value, int) and not isinstance(value, wanted):
        value = float(value) if abs(value) < 2**63 else math.inf
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, wanted) and not (isinstance(value, int) and abs(value) >= 2**63)
