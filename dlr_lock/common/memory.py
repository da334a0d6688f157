"""Sizes of memory as users write them."""

import os
import re

from .errors import DLRError

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def memory_bytes(size: int | str | None) -> int:
    """'4GiB', '500M' or a number of bytes, in bytes; None for a quarter of the machine's memory.

    Raises DLRError on what is no such size.
    """
    if size is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(size).strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise DLRError(f"cannot read {size!r} as a size of memory; write for example 4GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
