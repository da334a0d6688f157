"""Sequential calibration: what each module should make of the locked model's own activations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...common.micro_batch import MicroBatch
from ...common.progress import Count, no_count
from ...common.weights import checked_store, drop_pages, storage
from ...runtime import DLRExperts, DLRNet
from ..evaluate import relative_error
from ..layer_runner import LayerRunner, Seen, Sum
from ..parallel.share import WHOLE, Rows
from .capture import batch_of
from .pairs import Activations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..mlp_matching import MLP


class SequentialCalibrator:
    """Sequential calibration: each module learns on the locked model's own activations to undo its errors so far.

    Two streams of hidden states go up the model layer by layer, the original's and the locked one's. An MLP adds
    y to the rest of its layer (`Sum`): total = factor * y + rest. What the module of the locked model should give
    is what brings its total to the original's:

        y* = (total_original - rest_locked) / factor        at x_locked

    which is the MLP's y where nothing was locked before. Where a norm stands between y and the sum, y* is the
    original's y. For each MLP, in model order, call `pairs` and then `put`; `put` alone where the chain is there
    already.

    Args:
        model: The original.
        mlps: The MLPs that are locked, in model order.
        tokens: [S, n] int64, the text.
        max_memory: Bytes for both streams, float32; beyond them they lie in files in `scratch`.
        scratch: The folder of these files.
        progress: Called with (sequences done, S) in every pass through a layer.
        share: What `tokens` are of the text of all processes.
        micro: How many sequences the device takes at once; None to learn it here.

    Raises:
        Unrepeatable: Where the model's layers cannot be run one at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mlps: list[MLP],
        tokens: Tensor,
        *,
        max_memory: int,
        scratch: Path,
        progress: Count = no_count,
        share: Rows = WHOLE,
        micro: MicroBatch | None = None,
    ) -> None:
        self._share = share
        self._micro = micro or MicroBatch("the reading of activations", "sequence")
        self.runner = LayerRunner(model, mlps, tokens)
        self._tokens = tokens
        self._device = model.device
        self._progress = progress
        d, count = mlps[0].hidden_size, tokens.numel()
        # Two streams in float32, x and y* in bfloat16: 12 bytes an element.
        self._scratch = scratch if 12 * count * d > max_memory else None
        self._teacher = storage(count, d, torch.float32, self._scratch).view(*tokens.shape, d)
        self._locked = self._teacher  # the same until something is locked
        self._layer = 0
        self._mlps = mlps
        self._placed: dict[str, DLRNet | DLRExperts] = {}  # chains of the layer that both streams are before
        # Modules whose targets are the original's outputs, for no Sum was found.
        self.uncorrected: set[str] = set()
        self._each(lambda rows: self._teacher[rows].copy_(self.runner.embed(tokens[rows])))

    @staticmethod
    def rounds(mlps: Sequence[MLP], todo: Sequence[MLP]) -> int:
        """How often the whole text is gone through, each time told to the progress from its beginning.

        Args:
            mlps: All that are locked, in model order.
            todo: Those of them whose pairs are wanted.
        """
        layers = sorted({mlp.layer for mlp in mlps})
        between = layers[-1] - layers[0] + 1 - len(layers)  # with MLPs of their own: each stream apart
        return 1 + layers[0] + len(todo) + len(layers) + 2 * between

    def pairs(self, mlp: MLP) -> Activations:
        """What an MLP's chain is to be fitted to: x of the locked model and y*, [S n, d] each in bfloat16."""
        self._go_to(mlp)
        n = self._tokens.shape[1]
        pairs = Activations.empty(self._tokens, mlp.hidden_size, torch.bfloat16, self._scratch)
        x, y = pairs.x, pairs.y
        pairs.share = self._share
        one = self._of(self._teacher, slice(0, 1))
        where = self._share.ranks.agreed(lambda: self.runner.find_sum(mlp, one))
        if where is None:
            self.uncorrected.add(mlp.module)

        def look(rows: slice) -> None:
            ours = theirs = self.runner.look(mlp, self._of(self._teacher, rows), where)
            if self._locked is not self._teacher or self._placed:
                ours = self.runner.look(mlp, self._of(self._locked, rows), where, self._placed)
            at = slice(rows.start * n, rows.stop * n)
            checked_store(x[at], ours.x, f"the input of {mlp.module}")
            pairs.route(at, ours.routing)
            checked_store(y[at], _wanted(theirs, ours, where), f"the output of {mlp.output}")
            self._forget(x, y)

        self._each(look)
        return pairs

    def put(self, mlp: MLP, net: DLRNet | DLRExperts) -> float | None:
        """Takes the fitted chain in the MLP's place and, where it is the last of its layer, moves on behind that.

        Returns:
            How far the locked stream is from the original's there: the mean over tokens of
            |locked - original|^2 / |original|^2; None where more of the layer's MLPs are to come.
        """
        self._go_to(mlp)
        self._placed[mlp.module] = copy.deepcopy(net).to(self._device)
        layer_of = self.runner.layer_of
        here = [other.module for other in self._mlps if layer_of[other.module] == layer_of[mlp.module]]
        if here[-1] != mlp.module:
            return None
        before = self._locked
        if before is self._teacher:
            size = self._tokens.numel(), mlp.hidden_size
            self._locked = storage(*size, torch.float32, self._scratch).view_as(before)
        drift = 0.0

        def advance(rows: slice) -> None:
            nonlocal drift
            out = self.runner.look(mlp, self._of(before, rows), instead=self._placed).out
            truth = self.runner.run(self._layer, self._of(self._teacher, rows))
            error = relative_error(out.float().flatten(0, 1), truth.float().flatten(0, 1)).sum().item()
            out, truth = out.cpu(), truth.cpu()  # the device has done all: both streams change, or none
            drift += error
            self._locked[rows].copy_(out)
            self._teacher[rows].copy_(truth)

        self._each(advance)
        self._layer += 1
        self._placed = {}
        drift, count = self._share.ranks.total(drift, self._tokens.numel())
        return drift / count

    def _go_to(self, mlp: MLP) -> None:
        """Both streams through the layers before mlp's, which keep their MLPs."""
        while self._layer < self.runner.layer_of[mlp.module]:
            for stream in {id(s): s for s in (self._teacher, self._locked)}.values():
                self._each(partial(self._through, stream))
            self._layer += 1

    def _through(self, stream: Tensor, rows: slice) -> None:
        stream[rows].copy_(self.runner.run(self._layer, self._of(stream, rows)))

    def _of(self, stream: Tensor, rows: slice) -> Tensor:
        return stream[rows].to(self._device, self.runner.dtype)

    def _each(self, work: Callable[[slice], object]) -> None:
        """Does `work` on every sequence, a batch of them at a time."""
        sequences, n = self._tokens.shape

        def batch(rows: slice) -> None:
            work(rows)
            self._forget(self._teacher, self._locked)
            self._progress(rows.stop, sequences)

        self._progress(0, sequences)
        self._micro.each(batch, sequences, batch_of(n))

    def _forget(self, *stores: Tensor) -> None:
        """What lies in files is not kept in memory, too."""
        if self._scratch is not None:
            for store in stores:
                drop_pages(store)


def _wanted(theirs: Seen, ours: Seen, where: Sum | None) -> Tensor:
    """y*, from what the original's layer and the locked model's showed."""
    if where is None or theirs is ours:
        return theirs.y
    assert theirs.total is not None and ours.total is not None
    y = ours.y.float()
    rest = ours.total.float().view_as(y) - where.factor * y
    return (theirs.total.float().view_as(y) - rest) / where.factor
