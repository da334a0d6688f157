"""The user's cache: the folder of downloads and unpacked models, and small tables kept in it."""

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """$DLR_LOCK_CACHE, else dlr-lock in the user's cache folder; not necessarily there yet."""
    if own := os.environ.get("DLR_LOCK_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dlr-lock"


def read_table(name: str, versions: dict[str, Any]) -> dict[str, Any]:
    """The entries of a table that was kept under these versions; none where it is missing, damaged or of others."""
    try:
        kept = json.loads((cache_folder() / name).read_text(encoding="utf-8"))
        return dict(kept["entries"]) if kept["versions"] == versions else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_table(name: str, versions: dict[str, Any], entries: dict[str, Any]) -> None:
    """Keeps a table whole, which other processes may be writing, too: the last one wins.

    A cache that cannot be written, as in a read-only home, is passed over.
    """
    with suppress(OSError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as work:
            json.dump({"versions": versions, "entries": entries}, work, indent=1)
        Path(work.name).replace(folder / name)
