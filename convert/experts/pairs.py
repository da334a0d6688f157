"""What the chains of a mixture are fitted to, expert by expert.

An expert's chain gets what the router of the locked model gives its expert. Its target is what the expert makes of
that and, where modules correct one another, its share of what is still missing: with delta what the mixture should
give less what its experts would give, and w_j the weights of a token's experts, expert e is to give
w_e / sum_j w_j^2 * delta more, the smallest changes that add up to delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...common.weights import drop_pages, storage
from ...runtime.experts import one_expert
from ..activations.pairs import Activations
from ..parallel.share import Pair
from .routing import Mixture, Routing, router_of, together

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 4096  # tokens at a time


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Which tokens one expert's chain is fitted to, by their numbers among those of all processes.

    Attributes:
        expert: Its number.
        rows: [n] int64, training text first, then held-out text.
        weight: [n] float32, what the router multiplies the expert's output with; 0 where it did not choose it.
        train: How many are trained on.
        routed: How many of these the router gave the expert.
    """

    expert: int
    rows: Tensor
    weight: Tensor
    train: int
    routed: int

    @property
    def held(self) -> int:
        """How many are held out."""
        return len(self.rows) - self.train


@dataclass(frozen=True, slots=True)
class ExpertPairs:
    """What one expert's chain is fitted to.

    Attributes:
        pairs: x, y [n, d]: training text first, then held-out text.
        train: How many rows are trained on.
        routed: How many of these the router gave the expert.
    """

    pairs: Activations
    train: int
    routed: int


class MixturePairs:
    """What the chains of one mixture are fitted to.

    Args:
        model: Whose experts they are fitted to: the original, or a locked model for chains to be distilled back.
        mixture: The mixture.
        pairs: What goes into it, what should come out, and the routing, of all tokens or of a process's share; y is
            overwritten where it is corrected.
        train_rows: How many of the tokens of all processes, from the first, are trained on.
        corrected: Whether what should come out is more than what the experts give.

    Attributes:
        routing: Of the tokens of all processes.
        router: The [E, d] matrix that scores experts; None where that is not known.
    """

    def __init__(
        self, model: PreTrainedModel, mixture: Mixture, pairs: Activations, train_rows: int, corrected: bool
    ) -> None:
        assert pairs.routing is not None
        self.mixture, self.pairs = mixture, pairs
        self.routing = Routing(*(pairs.share.whole(part) for part in pairs.routing))
        self._first = pairs.share.whole(pairs.first.float()).bool()
        self._train_rows, self._device = train_rows, model.device
        self._experts = model.get_submodule(mixture.module)
        self.router = router_of(model, mixture)
        self._corrected = corrected
        self._received: dict[int, Pair] = {}  # what experts get, and delta there, by their numbers
        self._scratch: Path | None = None  # where that lies; None where it is in memory
        if corrected:  # y becomes delta
            for begin in range(0, len(pairs), _ROWS):
                rows = slice(begin, begin + _ROWS)
                x = self._on_device(pairs.x[rows])
                part = Routing(*(p[rows].to(self._device) for p in pairs.routing))
                pairs.y[rows] -= together(self._experts, mixture.experts, x, part).cpu().to(pairs.y.dtype)

    def of(self, expert: int, least: int = 0) -> ExpertPairs:
        """One expert's pairs, where all tokens are here. least: as for `rows_of`."""
        return self.pairs_of(self.rows_of(expert, least))

    def rows_of(self, expert: int, least: int = 0) -> ExpertRows:
        """One expert's tokens. least: training tokens that it gets at least, of the nearest tokens where the router
        gave it fewer. All processes must ask for the same."""
        rows, weight = self.routing.of(expert)
        trained = rows < self._train_rows
        routed = int(trained.sum())
        near = self._nearest(expert, rows, least - routed)
        rows = torch.cat([rows[trained], near, rows[~trained]])
        weight = torch.cat([weight[trained], torch.zeros(len(near)), weight[~trained]])
        return ExpertRows(expert, rows, weight, routed + len(near), routed)

    def deal(self, hands: Sequence[Sequence[ExpertRows]], room: int, scratch: Path) -> None:
        """Each process gets all that it fits its own experts to.

        Args:
            hands: Each process's experts, the same in every process.
            room: Bytes that this process may hold of activations, those of both streams and `pairs` included.
            scratch: The folder of what is beyond.
        """
        share, d = self.pairs.share, self.mixture.hidden_size
        wanted = [torch.cat([one.rows for one in hand] or [torch.arange(0)]) for hand in hands]
        count = len(wanted[share.ranks.rank])
        # 12 bytes an element of the tokens that are here, see `SequentialCalibrator`, and 4 of these.
        self._scratch = scratch if count and d * (12 * len(self.pairs) + 4 * count) > room else None
        x, missing = (storage(count, d, self.pairs.x.dtype, self._scratch) for _ in "xy")
        for at, part in share.sent([self.pairs.rows] * len(hands), wanted):
            x[at], missing[at] = part
            if self._scratch is not None:
                drop_pages(x)
                drop_pages(missing)
        sizes = [len(one.rows) for one in hands[share.ranks.rank]]
        parts = zip(x.split(sizes), missing.split(sizes), strict=True)
        self._received = {one.expert: pair for one, pair in zip(hands[share.ranks.rank], parts, strict=True)}

    def pairs_of(self, own: ExpertRows) -> ExpertPairs:
        """What one expert's chain is fitted to, once: of several processes by the one that the expert is dealt to."""
        here = own.expert in self._received
        x, y = self._received.pop(own.expert) if here else self._copied(own.rows)
        for begin in range(0, len(x), _ROWS):
            at = slice(begin, begin + _ROWS)
            wanted = one_expert(self._experts, own.expert, self._on_device(x[at])).cpu().to(y.dtype)
            if self._corrected:
                squares = self.routing.weight[own.rows[at]].square().sum(1).clamp(min=1e-12)
                wanted += ((own.weight[at] / squares)[:, None] * y[at].float()).to(y.dtype)
            y[at] = wanted
        mapped = self._scratch is not None
        return ExpertPairs(
            Activations(x, y, self._first[own.rows], mapped, self._scratch), own.train, own.routed
        )

    def _copied(self, rows: Tensor) -> Pair:
        x, y = (torch.empty(len(rows), self.mixture.hidden_size, dtype=self.pairs.x.dtype) for _ in "xy")
        for begin in range(0, len(rows), _ROWS):
            at = slice(begin, begin + _ROWS)
            x[at] = self.pairs.x[rows[at]]
            if self._corrected:
                y[at] = self.pairs.y[rows[at]]
        return x, y

    def tokens_of(self, expert: int) -> int:
        """Training tokens that the router gave an expert."""
        rows, _ = self.routing.of(expert)
        return int((rows < self._train_rows).sum())

    def _nearest(self, expert: int, rows: Tensor, count: int) -> Tensor:
        """Training tokens that are not the expert's and that its router's score is highest for, [count] at most; by the
        lead of the token's last expert over it where all scores are known, else drawn at random."""
        free = torch.ones(self._train_rows, dtype=torch.bool)
        free[rows[rows < len(free)]] = False
        others = free.nonzero()[:, 0]
        if count <= 0 or not len(others):
            return others[:0]
        if self.router is None:
            generator = torch.Generator().manual_seed(expert)
            return others[torch.randperm(len(others), generator=generator)[:count]].sort().values
        share = self.pairs.share
        owner, places = share.places(others)
        lead = torch.zeros(len(others))
        k = self.routing.chosen.shape[1]
        for here in (owner == share.ranks.rank).nonzero()[:, 0].split(_ROWS):
            scores = self.pairs.x[places[here]].float() @ self.router.float().cpu().T
            lead[here] = scores[:, expert] - scores.topk(k, 1).values[:, -1]
        share.ranks.add([lead])  # zeros elsewhere: the sums are exact
        return others[lead.argsort(descending=True)[:count]].sort().values

    def _on_device(self, x: Tensor) -> Tensor:
        return x.to(self._device, next(self._experts.parameters()).dtype)
