"""Where results go: one folder a device, one file a run, each written whole or not at all."""

import json
import re
from pathlib import Path
from typing import Any

from dlr_lock.runtime.files import write_whole

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
