"""Which rows of the activations a process has, and how it finds its part of what all draw together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .ranks import ALONE, Ranks

Pair = tuple[Tensor, Tensor]  # x and y


class Rows:
    """All rows are here, in their order: training text first, then held-out text.

    Attributes:
        ranks: Who else has rows of these.
    """

    ranks: Ranks = ALONE

    def mine(self, rows: Tensor) -> Tensor:
        """Where those of `rows` [b] int64, of the training text of all processes, lie that are here."""
        return rows

    def sample(self, take: Callable[[Tensor], Pair], rows: Tensor) -> Pair:
        """x and y at `rows` [b] of the training text of all processes, [b, d] each, whole in each process.

        take: Gives x and y at rows that are here.
        """
        return take(rows)

    def held(self, tokens: int, here: int) -> Tensor:
        """The held-out rows that are here, [h] int64. tokens: training rows of all; here: how many rows are here."""
        return torch.arange(tokens, here)

    def first(self, first: Tensor, tokens: int) -> Tensor:
        """Rows of the training text of all that are first of their sequences, [F] int64. first: [N] bool, of the rows
        that are here; tokens: training rows of all."""
        return first[:tokens].nonzero()[:, 0]


WHOLE = Rows()


class Share(Rows):
    """Every so many-th sequence, of the training text and of the held-out text.

    Args:
        ranks: The processes.
        train: [S, n] int64, the training text of all.
        heldout: [H, n] int64, the held-out text of all; a process may have none of it.

    Attributes:
        tokens: [s, n] int64, what of both is this process's.
    """

    def __init__(self, ranks: Ranks, train: Tensor, heldout: Tensor) -> None:
        self.ranks = ranks
        self._n = train.shape[1]
        own = train[ranks.rank :: ranks.size]
        self._train = own.numel()
        self.tokens = torch.cat([own, heldout[ranks.rank :: ranks.size]])

    def mine(self, rows: Tensor) -> Tensor:
        sequence = rows // self._n
        here = sequence % self.ranks.size == self.ranks.rank
        return (sequence[here] // self.ranks.size) * self._n + rows[here] % self._n

    def sample(self, take: Callable[[Tensor], Pair], rows: Tensor) -> Pair:
        here = (rows // self._n) % self.ranks.size == self.ranks.rank
        x, y = (part.new_zeros(len(rows), *part.shape[1:]) for part in take(rows[:0]))
        x[here], y[here] = take(self.mine(rows))
        self.ranks.add([x])  # zeros elsewhere: the sums are exact
        self.ranks.add([y])
        return x, y

    def held(self, tokens: int, here: int) -> Tensor:
        return torch.arange(self._train, here)

    def first(self, first: Tensor, tokens: int) -> Tensor:
        return torch.arange(0, tokens, self._n)
