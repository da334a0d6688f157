"""Every choice of a conversion, with defaults that suit the machine."""

import os
import re
from dataclasses import dataclass, replace
from typing import Any

from ..runtime import DLRError
from ..runtime.checkpoint import usable_device
from ..runtime.dtypes import DTYPES

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of `convert_model`; None means: chosen by `resolved`.

    layers: '2-5,9', None for all. mlps: a regular expression for modules that are not recognised. depth, rank:
    of the chains, matched to the MLP's parameters where None. data: calibration text (see `load_text`).
    tokens, heldout: tokens of calibration text to train on and to report on. visits: token visits a module.
    dtype: of the checkpoint, 'auto' for the source's own. max_memory: bytes for activations, or '4GiB'.
    """

    layers: str | None = None
    mlps: str | None = None
    depth: int | None = None
    rank: int | None = None
    lanes: int = 1
    gated: bool = False
    act: str = "silu"
    start: str = "random"
    data: str = "self"
    tokens: int | None = None
    heldout: int | None = None
    visits: int | None = None
    batch: int | None = None
    seed: int = 0
    temperature: float = 1.0
    dtype: str = "auto"
    device: str | None = None
    max_memory: int | str | None = None

    def resolved(self) -> "Options":
        """The same with every None that depends on the machine filled in. Raises DLRError on bad values."""
        device = usable_device(self.device)
        # A module's fit of 0.4 M visits takes about 80 s on two CPU cores; a GPU has room for more of both.
        generous = device.type != "cpu"
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise DLRError(f"unknown dtype {self.dtype!r}; one of auto, {', '.join(DTYPES)}")
        for name in ("tokens", "heldout", "visits", "batch", "lanes", "depth", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DLRError(f"--{name} must be at least 1, not {value}")
        if not 0 <= self.seed < 2**62:
            raise DLRError(f"--seed must be from 0 to {2**62 - 1}, not {self.seed}")
        if not 1e-3 <= self.temperature <= 1e3:
            raise DLRError(f"--temperature must be from 0.001 to 1000, not {self.temperature:g}")
        tokens = self.tokens or (2_097_152 if generous else 163_840)
        return replace(
            self,
            tokens=tokens,
            heldout=self.heldout or max(512, min(10_240, tokens // 8)),
            visits=self.visits or (8_388_608 if generous else 409_600),
            batch=self.batch or 512,
            device=str(device),
            max_memory=_bytes(self.max_memory),
        )

    def said(self) -> dict[str, Any]:
        """The choices that a report repeats."""
        return {name: getattr(self, name) for name in self.__slots__}


def _bytes(size: int | str | None) -> int:
    """'4GiB', '500M' or a number of bytes; None for a quarter of the machine's memory."""
    if size is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(size).strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise DLRError(f"cannot read {size!r} as a size of memory; write for example 4GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
