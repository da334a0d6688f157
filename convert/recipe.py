"""How a module is distilled: visits, batches, learning rate, where it starts."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime import DLRError

STARTS = ("mixed", "random")

_WARMUP = 0.125  # share of the visits, and at most 150 steps
_DECAY = 0.5  # share of the visits, at the end, over which the rate falls to 0
_FIRST = 4 / 512  # share of a batch that is drawn from first tokens, beside those that come by chance


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and from where to distil: `visits` token visits in batches of `batch` tokens.

    start: 'mixed' from sums and differences of the teacher's reading directions, or 'random'; see start.py.
    rate, momentum: of Muon. scale: the output scale in units of y; a smaller one makes the chain move its state
    by more. metric: the exponent of the reading metric. writing: B's rate over that of A and G.
    weight_decay: see Muon.
    Raises DLRError on values that make no sense.
    """

    visits: int
    batch: int = 512
    start: str = "mixed"
    seed: int = 0
    rate: float = 0.012
    momentum: float = 0.95
    scale: float = 1.0
    metric: float = 0.2
    writing: float = 2.0
    weight_decay: float = 0.03

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise DLRError(f"unknown start {self.start!r}; one of {', '.join(STARTS)}")
        for name, low, high in (
            ("rate", 1e-6, 100.0), ("momentum", 0.0, 0.999), ("scale", 1e-3, 1e3), ("metric", 0.0, 1.0),
            ("writing", 1e-3, 1e3), ("weight_decay", 0.0, 1.0),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise DLRError(f"{name} must be from {low:g} to {high:g}, not {getattr(self, name):g}")
        if self.batch < 1 or self.visits < self.batch:
            raise DLRError(f"{self.visits} visits are not even one batch of {self.batch} tokens")

    def schedule(self, visited: float) -> float:
        """Share of the peak learning rate after some visits: up, flat, down to 0."""
        done = visited / self.visits
        warmup = min(_WARMUP, 150 * self.batch / self.visits)
        return min(1.0, done / warmup, (1 - done) / _DECAY)

    def batches(self, tokens: int, first: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Indices of tokens, without replacement within an epoch, until the visits are spent.

        A few in each batch are first tokens of their sequences, whose indices are `first`: these carry the
        massive activations of some layers and are rare (one in 512).
        """
        left = self.visits
        order = torch.empty(0, dtype=torch.int64)
        while left > 0:
            size = min(self.batch, left, tokens)
            # 4 of 512; of a small batch now and then one
            chance = torch.rand((), generator=generator).item()
            extra = int(size * _FIRST + chance) if len(first) else 0
            if len(order) < size - extra:
                order = torch.randperm(tokens, generator=generator)
            rows, order = order[: size - extra], order[size - extra :]
            left -= size
            if extra:
                rows = torch.cat([rows, first[torch.randint(len(first), (extra,), generator=generator)]])
            yield rows
