"""Sizes of memory as users write them, and how much of it a process takes."""

import gc
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

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


def watch_memory(device: str) -> Callable[[], tuple[int, int] | None]:
    """Starts to watch how far this process's memory grows on a device, "cuda" or "cpu".

    Returns:
        What gives (bytes at the start, most bytes since): on a GPU what torch has allocated, else the resident memory;
        None where nobody counts them, which Linux does.
    """
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        return lambda: (allocated, torch.cuda.max_memory_allocated())
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = _resident("VmRSS")
    return lambda: None if start is None else (start, max(start, _resident("VmHWM") or 0))


def _resident(name: str) -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return None
