"""The two sides of a module on a text: what goes in, and what comes out or should come out."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...common.weights import drop_pages, storage
from ..experts.routing import Routing
from ..parallel.share import WHOLE, Rows


class Activations:
    """Input and output of one MLP on N tokens, on the CPU, valid until `close()`.

    Attributes:
        x, y: [N, d] in the dtype of the capture, in memory or memory-mapped.
        first: [N] bool, true at the first token of each sequence.
        mapped: Whether x and y are mapped files.
        scratch: The folder of such files; None where they are in memory.
        routing: Of a mixture, which experts each token is given to; None of an MLP.
        share: Which rows these are of those of all processes.
    """

    routing: Routing | None = None
    share: Rows = WHOLE

    def __init__(
        self, x: Tensor, y: Tensor, first: Tensor, mapped: bool, scratch: Path | None = None
    ) -> None:
        self._x: Tensor | None = x
        self._y: Tensor | None = y
        self.first = first
        self.mapped = mapped
        self.scratch = scratch

    @classmethod
    def empty(cls, tokens: Tensor, width: int, dtype: torch.dtype, place: Path | None) -> Activations:
        """Room for what goes in and out at the tokens of a text.

        Args:
            tokens: [S, n] int64, the text; there may be none.
            width: d.
            dtype: Of x and y.
            place: The folder of their files; None to have them in memory.
        """
        first = torch.arange(tokens.numel()) % tokens.shape[1] == 0
        x, y = (storage(tokens.numel(), width, dtype, place) for _ in "xy")
        return cls(x, y, first, place is not None, place)

    def __len__(self) -> int:
        return len(self.first)

    def route(self, rows: slice, part: Routing | None) -> None:
        """Takes note of the routing of some tokens."""
        if part is None:
            return
        if self.routing is None:
            k = part.chosen.shape[1]
            self.routing = Routing(torch.zeros(len(self), k, dtype=torch.int64), torch.zeros(len(self), k))
        for whole, piece in zip(self.routing, part, strict=True):
            whole[rows] = piece.cpu().to(whole.dtype)

    @property
    def x(self) -> Tensor:
        return _open(self._x)

    @property
    def y(self) -> Tensor:
        return _open(self._y)

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of x and y at the tokens index [b] int64, in that order, both [b, d].

        A mapped file is read in ascending order: neighbours share pages, and the disk is read forwards.
        """
        if not self.mapped:
            return self.x.index_select(0, index), self.y.index_select(0, index)
        ascending, order = index.sort()
        x, y = (part.index_select(0, ascending).index_select(0, order.argsort()) for part in (self.x, self.y))
        self.forget()
        return x, y

    def forget(self) -> None:
        """Of what lies in files nothing stays in memory, or in the end all of it would."""
        if self.scratch is not None:
            for part in (self.x, self.y):
                drop_pages(part)

    def like_y(self) -> Tensor:
        """Room for other outputs, [N, d], where x and y are."""
        return storage(len(self), self.y.shape[1], self.y.dtype, self.scratch)

    def close(self) -> None:
        """Give the memory, or the disk space, back."""
        self._x = self._y = None


def _open(part: Tensor | None) -> Tensor:
    if part is None:
        raise RuntimeError("these activations were released when the next ones were asked for")
    return part
