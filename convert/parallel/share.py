"""Which rows of the activations a process has, and how it finds its part of what all draw together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .ranks import ALONE, Ranks

Pair = tuple[Tensor, Tensor]  # x and y
_ROWS = 4096  # for each process, in one exchange


class Rows:
    """All rows are here, in their order: training text first, then held-out text.

    Attributes:
        ranks: Who else has rows of these.
    """

    ranks: Ranks = ALONE

    def mine(self, rows: Tensor) -> Tensor:
        """Where those of `rows` [b] int64, of all processes, lie that are here."""
        return rows

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which process has each of `rows` [b] int64, of all processes, and where it lies there, [b] int64 each."""
        return torch.zeros_like(rows), rows

    def whole(self, part: Tensor) -> Tensor:
        """Of numbers that each row here has, [here, ..], those of the rows of all processes, whole in each process."""
        return part

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

    def sent(
        self, takes: Sequence[Callable[[Tensor], Pair]], wanted: Sequence[Tensor]
    ) -> Iterator[tuple[slice, Pair]]:
        """x and y at the rows that this process wants, a few thousand at a time, from whichever processes have them.

        Args:
            takes: For each process what gives x and y at rows that are here, of what it wants; all of one width.
            wanted: For each process the rows [b] int64, of all processes, that it wants, the same in every process.

        Yields:
            Which of this process's, and x and y of these.
        """
        rank = self.ranks.rank
        for begin in range(0, max(map(len, wanted)), _ROWS):
            places = [self.places(rows[begin : begin + _ROWS]) for rows in wanted]
            ours = [at[owner == rank] for owner, at in places]  # what each is to have from here
            owner, at = places[rank]
            counts = torch.bincount(owner, minlength=self.ranks.size).tolist()
            rows = torch.cat([torch.cat(take(part), 1) for take, part in zip(takes, ours, strict=True)])
            got = self.ranks.exchange(rows, [len(part) for part in ours], counts)
            both = torch.empty_like(got)
            both[owner.argsort(stable=True)] = got  # in the order that they were wanted in
            x, y = both.chunk(2, 1)
            yield slice(begin, begin + len(at)), (x, y)


WHOLE = Rows()


class _Spread(Rows):
    """Rows that lie in several processes. rows: how many there are."""

    def __init__(self, ranks: Ranks, rows: int) -> None:
        self.ranks, self._rows = ranks, rows

    def mine(self, rows: Tensor) -> Tensor:
        owner, at = self.places(rows)
        return at[owner == self.ranks.rank]

    def whole(self, part: Tensor) -> Tensor:
        owner, at = self.places(torch.arange(self._rows))
        here = owner == self.ranks.rank
        together = part.new_zeros(self._rows, *part.shape[1:])
        together[here] = part[at[here]]
        self.ranks.add([together])  # zeros elsewhere: the sums are exact
        return together


class Batches(_Spread):
    """Every so many-th batch of sequences: the batches of one process, so that products round as they do there.

    Args:
        ranks: The processes.
        tokens: [S, n] int64, the text of all.
        batch: Sequences of a batch.

    Attributes:
        tokens: [s, n] int64, what of it is this process's; there may be none.
    """

    def __init__(self, ranks: Ranks, tokens: Tensor, batch: int) -> None:
        super().__init__(ranks, tokens.numel())
        self._batch = batch * tokens.shape[1]
        self.tokens = torch.cat([tokens[:0], *tokens.split(batch)[ranks.rank :: ranks.size]])

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        number, size = rows // self._batch, self.ranks.size
        return number % size, number // size * self._batch + rows % self._batch


class Share(_Spread):
    """Every so many-th sequence, of the training text and of the held-out text.

    Args:
        ranks: The processes.
        train: [S, n] int64, the training text of all.
        heldout: [H, n] int64, the held-out text of all; a process may have none of it.

    Attributes:
        tokens: [s, n] int64, what of both is this process's.
    """

    def __init__(self, ranks: Ranks, train: Tensor, heldout: Tensor) -> None:
        super().__init__(ranks, train.numel() + heldout.numel())
        self._n = train.shape[1]
        self._sequences = len(train)  # to train on, of all
        own = train[ranks.rank :: ranks.size]
        self._train = own.numel()
        self.tokens = torch.cat([own, heldout[ranks.rank :: ranks.size]])

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        sequence, size = rows // self._n, self.ranks.size
        held = sequence >= self._sequences
        number = torch.where(held, sequence - self._sequences, sequence)
        owner = number % size
        # Held-out text comes behind the process's training text.
        before = torch.where(held, (self._sequences - owner + size - 1) // size, 0)
        return owner, (before + number // size) * self._n + rows % self._n

    def sample(self, take: Callable[[Tensor], Pair], rows: Tensor) -> Pair:
        owner, at = self.places(rows)
        here = owner == self.ranks.rank
        x, y = (part.new_zeros(len(rows), *part.shape[1:]) for part in take(rows[:0]))
        x[here], y[here] = take(at[here])
        self.ranks.add([x])  # as above
        self.ranks.add([y])
        return x, y

    def held(self, tokens: int, here: int) -> Tensor:
        return torch.arange(self._train, here)

    def first(self, first: Tensor, tokens: int) -> Tensor:
        return torch.arange(0, tokens, self._n)
