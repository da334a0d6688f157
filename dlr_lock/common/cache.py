"""The user's cache: the folder of downloads and unpacked models."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$DLR_LOCK_CACHE, else dlr-lock in the user's cache folder; not necessarily there yet."""
    if own := os.environ.get("DLR_LOCK_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dlr-lock"
