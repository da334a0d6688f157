"""Sequential distillation: each module learns on the locked model's own activations to undo its errors so far.

Two streams of hidden states go up the model layer by layer, the original's and the locked one's. An MLP adds
y to the rest of its layer (`Sum`): total = factor * y + rest. What the module of the locked model should give
is what brings its total to the original's:

    y* = (total_original - rest_locked) / factor        at x_locked

which is the MLP's y where nothing was locked before. Where a norm stands between y and the sum, y* is the
original's y.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..runtime import DLRNet
from .capture import Activations, checked_store, storage
from .fidelity import relative_error
from .layers import Seen, Stack, Sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .mlps import MLP

_BATCH_TOKENS = 4096


class Streams:
    """The hidden states of tokens [S, n] in the original and in the locked model, at the same layer of both.

    They are float32 and lie in memory, or in files in `scratch` where they would exceed max_memory bytes.
    For each MLP, in model order, call `pairs` and then `put`; `put` alone where the chain is there already.
    progress is called with (sequences done, S) in every pass through a layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mlps: list[MLP],
        tokens: Tensor,
        *,
        max_memory: int,
        scratch: Path,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._stack = Stack(model, mlps, tokens)
        self._tokens = tokens
        self._device = model.device
        self._progress = progress or (lambda done, total: None)
        d, count = mlps[0].hidden_size, tokens.numel()
        # Two streams in float32, x and y* in bfloat16: 12 bytes an element.
        self._scratch = scratch if 12 * count * d > max_memory else None
        self._teacher = storage(count, d, torch.float32, self._scratch).view(*tokens.shape, d)
        self._locked = self._teacher  # the same until something is locked
        self._layer = 0
        # Modules whose targets are the original's outputs, for no Sum was found.
        self.uncorrected: set[str] = set()
        self._first = torch.zeros(tokens.shape, dtype=torch.bool)
        self._first[:, 0] = True
        for rows in self._batches():
            self._teacher[rows].copy_(self._stack.embed(tokens[rows]))

    def pairs(self, mlp: MLP) -> Activations:
        """What mlp's module should make of what: (x_locked, y*) in bfloat16, with (sequence, token) as rows."""
        self._go_to(mlp)
        count, d, n = self._tokens.numel(), mlp.hidden_size, self._tokens.shape[1]
        x, y = (storage(count, d, torch.bfloat16, self._scratch) for _ in "xy")
        where = self._stack.find_sum(mlp, self._of(self._teacher, slice(0, 1)))
        if where is None:
            self.uncorrected.add(mlp.module)
        for rows in self._batches():
            ours = theirs = self._stack.look(mlp, self._of(self._teacher, rows), where)
            if self._locked is not self._teacher:
                ours = self._stack.look(mlp, self._of(self._locked, rows), where)
            at = slice(rows.start * n, rows.stop * n)
            checked_store(x[at], ours.x, f"the input of {mlp.module}")
            checked_store(y[at], _wanted(theirs, ours, where), f"the output of {mlp.output}")
        return Activations(x, y, self._first.flatten(), self._scratch is not None)

    def put(self, mlp: MLP, net: DLRNet) -> float:
        """Takes the fitted chain in the MLP's place and moves on behind its layer.

        Returns how far the locked stream is from the original's there: the mean over tokens of
        |locked - original|^2 / |original|^2.
        """
        self._go_to(mlp)
        before = self._locked
        if before is self._teacher:
            size = self._tokens.numel(), mlp.hidden_size
            self._locked = storage(*size, torch.float32, self._scratch).view_as(before)
        chain = copy.deepcopy(net).to(self._device)
        drift = 0.0
        for rows in self._batches():
            out = self._stack.look(mlp, self._of(before, rows), instead=lambda x, y: chain(x)).out
            truth = self._stack.run(self._layer, self._of(self._teacher, rows))
            drift += relative_error(out.float().flatten(0, 1), truth.float().flatten(0, 1)).sum().item()
            self._locked[rows].copy_(out)
            self._teacher[rows].copy_(truth)
        self._layer += 1
        return drift / self._tokens.numel()

    def _go_to(self, mlp: MLP) -> None:
        """Both streams through the layers before mlp's, which keep their MLPs."""
        while self._layer < self._stack.layer_of[mlp.module]:
            for stream in {id(s): s for s in (self._teacher, self._locked)}.values():
                for rows in self._batches():
                    stream[rows].copy_(self._stack.run(self._layer, self._of(stream, rows)))
            self._layer += 1

    def _of(self, stream: Tensor, rows: slice) -> Tensor:
        return stream[rows].to(self._device, self._stack.dtype)

    def _batches(self) -> Iterator[slice]:
        sequences, n = self._tokens.shape
        size = max(1, _BATCH_TOKENS // n)
        self._progress(0, sequences)
        for at in range(0, sequences, size):
            rows = slice(at, min(at + size, sequences))
            yield rows
            self._progress(rows.stop, sequences)


def _wanted(theirs: Seen, ours: Seen, where: Sum | None) -> Tensor:
    """y*, from what the original's layer and the locked model's showed."""
    if where is None or theirs is ours:
        return theirs.y
    assert theirs.total is not None and ours.total is not None
    y = ours.y.float()
    rest = ours.total.float().view_as(y) - where.factor * y
    return (theirs.total.float().view_as(y) - rest) / where.factor
