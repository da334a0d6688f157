"""Every choice of a conversion, with defaults that suit the machine."""

import os
import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..runtime import DLRError
from ..runtime.checkpoint import usable_device
from ..runtime.dtypes import DTYPES
from .recipe import Recipe


@dataclass(frozen=True, slots=True)
class Effort:
    """What an effort stands for, in words and on a CPU: tokens of calibration text, token visits a module and of
    the end-to-end phase, and the attacker's share of a module's visits."""

    words: str
    tokens: int
    visits: int
    together: int
    unlock: float

    def on(self, device: torch.device) -> "Effort":
        """The same for a device: a GPU has time for more."""
        if device.type == "cpu":
            return self
        return replace(self, tokens=8 * self.tokens, visits=20 * self.visits, together=64 * self.together)


# The words are of a 135M model on two CPU cores; the error is the relative one on held-out text.
EFFORTS = {
    "quick": Effort("half a minute a layer, error 0.24: a first look", 81_920, 102_400, 0, 0.0),
    "standard": Effort("four minutes a layer, error 0.17: for a few layers", 163_840, 409_600, 0, 0.25),
    "best": Effort(
        "over half an hour a layer, error 0.14, and an hour or two at the end",
        491_520,
        1_638_400,
        262_144,
        1.0,
    ),
}
ACROSS = ("sequential", "independent")

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of `convert_model`; None means: chosen by `resolved`.

    layers: '2-5,9', None for all. mlps: a regular expression for modules that are not recognised. depth, rank:
    of the chains, matched to `params` times the MLP's parameters where None. start: see `Recipe`. data: calibration
    text (see `load_text`). effort: 'quick', 'standard' or 'best', which the next five are chosen by. tokens, heldout:
    tokens of calibration text to train on and to report on. visits: token visits a module. together: token visits of
    the end-to-end phase, 0 for none. unlock: the visits of the attack on each module, as a share of the
    conversion's, 0 to leave it out. sequence: tokens a sequence of calibration text. across: 'sequential' for
    modules that correct one another's errors, 'independent'; None for sequential where the model allows it.
    dtype: of the checkpoint, 'auto' for the source's own. max_memory: bytes for activations, or '4GiB'.
    """

    layers: str | None = None
    mlps: str | None = None
    depth: int | None = None
    rank: int | None = None
    lanes: int = 1
    gated: bool = False
    act: str = "silu"
    params: float = 1.0
    start: str = "mixed"
    data: str = "self"
    effort: str = "standard"
    tokens: int | None = None
    heldout: int | None = None
    visits: int | None = None
    together: int | None = None
    unlock: float | None = None
    sequence: int | None = None
    across: str | None = None
    batch: int | None = None
    seed: int = 0
    temperature: float = 1.0
    dtype: str = "auto"
    device: str | None = None
    max_memory: int | str | None = None

    def resolved(self) -> "Options":
        """The same with every None that depends on the machine filled in. Raises DLRError on bad values."""
        device = usable_device(self.device)
        if self.effort not in EFFORTS:
            raise DLRError(f"unknown effort {self.effort!r}; one of {', '.join(EFFORTS)}")
        if self.across not in (None, *ACROSS):
            raise DLRError(f"unknown way across the layers {self.across!r}; one of {', '.join(ACROSS)}")
        effort = EFFORTS[self.effort].on(device)
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise DLRError(f"unknown dtype {self.dtype!r}; one of auto, {', '.join(DTYPES)}")
        for name in ("tokens", "heldout", "visits", "batch", "lanes", "depth", "rank", "sequence"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DLRError(f"--{name} must be at least 1, not {value}")
        if not 0 <= self.seed < 2**62:
            raise DLRError(f"--seed must be from 0 to {2**62 - 1}, not {self.seed}")
        if not 1e-3 <= self.temperature <= 1e3:
            raise DLRError(f"--temperature must be from 0.001 to 1000, not {self.temperature:g}")
        if not 0.1 <= self.params <= 10:
            raise DLRError(f"--params must be from 0.1 to 10 times the MLP's, not {self.params:g}")
        if self.together is not None and self.together < 0:
            raise DLRError(f"--together must not be negative, not {self.together}")
        if self.unlock is not None and not 0 <= self.unlock <= 100:
            raise DLRError(
                f"--unlock must be from 0 to 100 times the conversion's visits, not {self.unlock:g}"
            )
        tokens = self.tokens or effort.tokens
        chosen = replace(
            self,
            tokens=tokens,
            heldout=self.heldout or max(512, min(10_240, tokens // 8)),
            visits=self.visits or effort.visits,
            together=effort.together if self.together is None else self.together,
            unlock=effort.unlock if self.unlock is None else self.unlock,
            batch=self.batch or 512,
            device=str(device),
            max_memory=memory_bytes(self.max_memory),
        )
        chosen.recipe()  # raises on what makes none
        return chosen

    def recipe(self) -> Recipe:
        """How each module is distilled, for resolved options. Raises DLRError on values that make no sense."""
        return Recipe(int(self.visits or 0), int(self.batch or 0), self.start, self.seed)

    def said(self) -> dict[str, Any]:
        """The choices that a report repeats."""
        return {name: getattr(self, name) for name in self.__slots__}


def memory_bytes(size: int | str | None) -> int:
    """'4GiB', '500M' or a number of bytes; None for a quarter of the machine's memory."""
    if size is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(size).strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise DLRError(f"cannot read {size!r} as a size of memory; write for example 4GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
