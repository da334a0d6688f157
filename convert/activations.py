"""Teacher activations: what goes into each MLP and what comes out of it, on the calibration text.

A pass over the text serves as many layers as fit into the memory budget and ends right behind the last of
them. A layer that does not fit alone is kept in memory-mapped files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.dtypes import fast_products
from ..common.errors import DLRError
from ..common.hooks import StopForward, submodule, watch_pass
from ..common.micro_batch import MicroBatch
from ..common.progress import Count, no_count
from ..common.weights import checked_store, drop_pages, storage
from ..runtime import DLRExperts, DLRNet
from .evaluate import relative_error
from .experts.routing import Routing, read_call, read_output
from .layer_runner import LayerRunner, Seen, Sum
from .parallel.share import WHOLE, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .mlp_matching import MLP


BATCH_TOKENS = 4096  # in one forward pass: products are busy, and little is held beside the activations kept
_TRIAL_TOKENS = 8  # in the pass that tells whether every MLP is called exactly once


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


def group_layers(
    mlps: Sequence[MLP], tokens: int, max_memory: int, dtype: torch.dtype = torch.bfloat16
) -> list[list[MLP]]:
    """Which MLPs share a teacher pass: as many in a row as keep x and y within max_memory bytes, but one at least.

    Args:
        mlps: In the order that they are wanted in.
        tokens: How many tokens the pass is over.
        max_memory: Bytes for their activations; an MLP that is alone in its group and exceeds them goes to disk.
        dtype: Of the activations.
    """
    groups: list[list[MLP]] = []
    room = 0
    for mlp in mlps:
        size = _bytes(mlp, tokens, dtype)
        if not groups or size > room:
            groups.append([])
            room = max_memory
        groups[-1].append(mlp)
        room -= size
    return groups


def capture(
    model: PreTrainedModel,
    mlps: Sequence[MLP],
    tokens: Tensor,
    *,
    max_memory: int,
    scratch: Path,
    dtype: torch.dtype = torch.bfloat16,
    progress: Count = no_count,
    micro: MicroBatch | None = None,
) -> Iterator[tuple[MLP, Activations]]:
    """What goes into each MLP and what comes out of it, on a text.

    Activations are released when the next ones are asked for, so at no time is more than max_memory bytes
    held for them (what the caller still refers to comes on top).

    Args:
        model: Any transformers model.
        mlps: The MLPs that are watched.
        tokens: [S, n] int64.
        max_memory: Bytes for activations.
        scratch: Where x and y of an MLP lie that exceeds the budget alone, in files without a name: they vanish with
            the process, whatever ends it.
        dtype: Of the activations.
        progress: Called with (sequences done, S), from 0 to S in every pass.
        micro: How many sequences the device takes at once; None to learn it here.

    Yields:
        Each MLP, in the order given, with its activations.

    Raises:
        DLRError: Where an MLP is not called exactly once in a pass, does not see every token, or has NaN or infinity
            in its activations, and where `scratch` cannot hold what exceeds the memory, or the device one sequence.
    """
    sequences, n = tokens.shape
    if not mlps or not sequences:
        return
    micro = micro or MicroBatch("the reading of activations", "sequence")
    _check_calls(model, mlps, tokens[:1, : min(n, _TRIAL_TOKENS)])
    first = (torch.arange(n) == 0).expand(sequences, n)
    for group in group_layers(mlps, tokens.numel(), max_memory, dtype):
        mapped = _bytes(group[0], tokens.numel(), dtype) > max_memory
        place = scratch if mapped else None
        held: list[Activations] = []
        try:
            for mlp in group:
                x, y = (storage(tokens.numel(), mlp.hidden_size, dtype, place) for _ in "xy")
                held.append(Activations(x, y, first.flatten(), mapped, place))
                del x, y  # or they outlive close()
            _fill(model, group, held, tokens, progress, micro)
            for mlp, activations in zip(group, held, strict=True):
                yield mlp, activations
                activations.close()
        finally:
            for activations in held:
                activations.close()


def _bytes(mlp: MLP, tokens: int, dtype: torch.dtype) -> int:
    return 2 * tokens * mlp.hidden_size * dtype.itemsize


def _fill(
    model: PreTrainedModel,
    group: Sequence[MLP],
    held: Sequence[Activations],
    tokens: Tensor,
    progress: Count,
    micro: MicroBatch,
) -> None:
    sequences, n = tokens.shape

    def run(some: slice) -> None:
        rows = slice(some.start * n, some.stop * n)
        wanted = {(mlp.module, side) for mlp in group for side in ("input", "output")}

        def keep(index: int, side: str, value: Any) -> None:
            mlp = group[index]
            if (mlp.module, side) not in wanted:
                raise DLRError(f"{mlp.module} is called more than once in a pass: it cannot be replaced")
            part = held[index].x if side == "input" else held[index].y
            if side == "input":
                value, routing = value
                held[index].route(rows, routing)
            checked_store(part[rows], value, f"the {side} of {mlp.module if side == 'input' else mlp.output}")
            wanted.remove((mlp.module, side))
            if not wanted:
                raise StopForward

        _forward(model, group, tokens[some], keep)
        if wanted:
            raise DLRError(f"{min(wanted)[0]} is not called in every pass: leave it out of --layers")
        for activations in held:
            activations.forget()
        progress(some.stop, sequences)

    progress(0, sequences)
    micro.each(run, sequences, max(1, BATCH_TOKENS // n))


def _check_calls(model: PreTrainedModel, mlps: Sequence[MLP], tokens: Tensor) -> None:
    """Run a few tokens through the whole body and count how often each MLP is called, before the work starts: later
    passes stop behind the last MLP of their group and would miss a second call, as in ALBERT."""
    calls = {(index, side): 0 for index in range(len(mlps)) for side in ("input", "output")}

    def count(index: int, side: str, value: Any) -> None:
        calls[index, side] += 1

    _forward(model, mlps, tokens, count)
    for (index, side), number in calls.items():
        name = mlps[index].module if side == "input" else mlps[index].output
        if number == 0:
            raise DLRError(f"{name} is not called when the model runs: leave it out of --layers")
        if number > 1:
            raise DLRError(
                f"{name} is called {number} times in a pass: a module used more than once cannot be replaced"
            )


def _forward(
    model: PreTrainedModel, mlps: Sequence[MLP], tokens: Tensor, keep: Callable[[int, str, Any], None]
) -> None:
    """One forward pass of the body; calls keep(index of the MLP, "input", (x, routing)), keep(index, "output", y)."""

    def before(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(index, "input", read_call(mlps[index], args, kwargs))

    def after(index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        keep(index, "output", read_output(mlps[index], output))

    inputs, outputs = (
        [submodule(model, name(mlp)) for mlp in mlps] for name in (attrgetter("module"), attrgetter("output"))
    )
    hooks = [m.register_forward_pre_hook(partial(before, i), with_kwargs=True) for i, m in enumerate(inputs)]
    hooks += [m.register_forward_hook(partial(after, i)) for i, m in enumerate(outputs)]
    with fast_products(model.device, mlps[0].hidden_size):
        watch_pass(model, tokens, hooks)


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
        self._first = (torch.arange(tokens.shape[1]) == 0).expand(tokens.shape)
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
        count, d, n = self._tokens.numel(), mlp.hidden_size, self._tokens.shape[1]
        x, y = (storage(count, d, torch.bfloat16, self._scratch) for _ in "xy")
        pairs = Activations(x, y, self._first.flatten(), self._scratch is not None, self._scratch)
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
        self._micro.each(batch, sequences, max(1, BATCH_TOKENS // n))

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
