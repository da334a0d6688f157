"""The device that models and chains run on."""

import torch

from ..common.errors import DLRError, first_line
from ..triton_kernels import current_backend


def best_device() -> torch.device:
    """The first CUDA (or ROCm) device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable_device(name: torch.device | str | None) -> torch.device:
    """The device of that name, or the best there is for None.

    Raises:
        DLRError: Where it cannot be used, or not by the backend that the user asks for: before long work.
    """
    try:
        device = best_device() if name is None else torch.device(str(name).strip().lower())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DLRError(f"device {str(name)!r} cannot be used: {first_line(error)}") from error
    if device.type not in ("cpu", "cuda"):
        raise DLRError(f"device {str(name)!r} is not supported: use cpu or cuda")
    try:
        asked = current_backend()
    except ValueError as error:
        raise DLRError(str(error)) from error
    if asked == "triton" and device.type == "cpu":
        raise DLRError("backend 'triton' wants a CUDA or ROCm device: unset DLR_LOCK_BACKEND")
    return device
