"""Where results go: one folder a device, one file a run, each written whole or not at all."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def target(document: dict[str, Any], kind: str, out: Path | None) -> Path:
    """The JSON file of a run of `kind`: in `out`, or in the folder of document["device"] among the results."""
    slug = re.sub(r"[^a-z0-9]+", "-", document["device"].lower()).strip("-")
    date = re.sub(r"[-:]|\+.*", "", document["date"])
    return (out or RESULTS / slug) / f"{kind}-{date}.json"


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a document; NaN and infinity are refused."""
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write(a path beside `path`), and puts in place what it wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
