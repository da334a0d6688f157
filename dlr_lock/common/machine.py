"""What a result must say about where it comes from."""

import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .version import __version__


def machine(device: torch.device) -> dict[str, Any]:
    """What a result must say about where it comes from: device, driver, CPU threads, versions, date (UTC)."""
    return {
        "device": device_name(device),
        "driver": _driver(device),
        "cpu_threads": torch.get_num_threads(),
        "program": f"dlr-lock {__version__}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: _version(name) for name in ("triton", "transformers")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"CPU {line.partition(':')[2].strip()}"
    return f"CPU {platform.processor() or platform.machine()}"


def _driver(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip or sys.platform == "win32":
        return None
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True).stdout.split()
        return answer[0] if answer else None
    return None


def _version(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None
