"""Teacher activations: what goes into each MLP and what comes out of it, on the calibration text.

A pass over the text serves as many layers as fit into the memory budget and ends right behind the last of
them. A layer that does not fit alone is kept in memory-mapped files.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..runtime.errors import DLRError
from .evaluate import frozen, run_body

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .mlps import MLP

# Tokens in one forward pass: enough to keep the matrix products busy, little beside the activations kept.
_BATCH_TOKENS = 4096
# Tokens in the trial pass that tells whether every MLP is called exactly once.
_TRIAL_TOKENS = 8


class Activations:
    """Input and output of one MLP on N tokens, valid until `close()`.

    x, y    [N, d] in the dtype of the capture, in memory or memory-mapped (`mapped`), on the CPU
    first   [N] bool, True at the first token of each sequence
    """

    def __init__(self, x: Tensor, y: Tensor, first: Tensor, mapped: bool) -> None:
        self._x: Tensor | None = x
        self._y: Tensor | None = y
        self.first = first
        self.mapped = mapped

    def __len__(self) -> int:
        return len(self.first)

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
        back = order.argsort()
        x, y = (part.index_select(0, ascending).index_select(0, back) for part in (self.x, self.y))
        return x, y

    def close(self) -> None:
        """Give the memory, or the disk space, back."""
        self._x = self._y = None


def random_rows(tokens: int, count: int, seed: int) -> Tensor:
    """`count` of the first `tokens` rows (all where there are fewer), int64, ascending. At random: every so
    many-th token can be the first of its sequence each time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(tokens, generator=generator)[:count].sort().values


def _open(part: Tensor | None) -> Tensor:
    if part is None:
        raise RuntimeError("these activations were released when the next ones were asked for")
    return part


def group_layers(
    mlps: Sequence[MLP], tokens: int, max_memory: int, dtype: torch.dtype = torch.bfloat16
) -> list[list[MLP]]:
    """Which MLPs share a teacher pass: as many in a row as keep x and y within max_memory bytes.

    At least one; one that is alone and too large is the one that goes to disk.
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
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[MLP, Activations]]:
    """Yield each MLP, in the order given, with its activations on tokens [S, n].

    Activations are released when the next ones are asked for, so at no time is more than max_memory bytes
    held for them (what the caller still refers to comes on top). x and y of an MLP that exceeds the budget
    alone lie in `scratch`, in files without a name: they vanish with the process, whatever ends it. progress
    is called with (sequences done, S), from 0 to S in every pass.
    Raises DLRError when an MLP is not called exactly once in a pass, does not see every token, or has NaN or
    infinity in its activations, and when `scratch` cannot hold what does not fit into memory.
    """
    sequences, n = tokens.shape
    if not mlps or not sequences:
        return
    _check_calls(model, mlps, tokens[:1, : min(n, _TRIAL_TOKENS)])
    first = torch.zeros(sequences, n, dtype=torch.bool)
    first[:, 0] = True
    for group in group_layers(mlps, tokens.numel(), max_memory, dtype):
        mapped = _bytes(group[0], tokens.numel(), dtype) > max_memory
        held: list[Activations] = []
        try:
            for mlp in group:
                x, y = (
                    storage(tokens.numel(), mlp.hidden_size, dtype, scratch if mapped else None) for _ in "xy"
                )
                held.append(Activations(x, y, first.flatten(), mapped))
            _fill(model, group, held, tokens, progress)
            del x, y
            for mlp, activations in zip(group, held, strict=True):
                yield mlp, activations
                activations.close()
        finally:
            for activations in held:
                activations.close()


def _bytes(mlp: MLP, tokens: int, dtype: torch.dtype) -> int:
    return 2 * tokens * mlp.hidden_size * dtype.itemsize


def storage(rows: int, width: int, dtype: torch.dtype, scratch: Path | None) -> Tensor:
    """[rows, width], in memory, or in a nameless file in `scratch` that vanishes with the process.

    Raises DLRError where the disk has no room for it.
    """
    if scratch is None:
        return torch.empty(rows, width, dtype=dtype)
    size = rows * width * dtype.itemsize
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="activations-", dir=scratch)
        try:
            # Take the space now: a mapped file that meets a full disk later kills the process (SIGBUS).
            os.posix_fallocate(descriptor, 0, size)
            return torch.from_file(name, shared=True, size=rows * width, dtype=dtype).view(rows, width)
        finally:
            os.close(descriptor)
            os.unlink(name)  # the mapping keeps the data; nothing is left behind, even by kill -9
    except OSError as error:
        raise DLRError(
            f"{scratch}: no room for {size / 2**20:,.0f} MiB of activations ({error.strerror}); "
            "allow more --max-memory or use fewer --tokens"
        ) from error


class _Stop(Exception):
    """Everything wanted of this forward pass is there."""


def _fill(
    model: PreTrainedModel,
    group: Sequence[MLP],
    held: Sequence[Activations],
    tokens: Tensor,
    progress: Callable[[int, int], None] | None,
) -> None:
    sequences, n = tokens.shape
    at_once = max(1, _BATCH_TOKENS // n)
    if progress is not None:
        progress(0, sequences)
    for begin in range(0, sequences, at_once):
        batch = tokens[begin : begin + at_once]
        rows = slice(begin * n, (begin + len(batch)) * n)
        wanted = {(mlp.module, side) for mlp in group for side in ("input", "output")}

        # The arguments that differ from turn to turn are bound now, not when the hook runs.
        def keep(
            index: int, side: str, value: Any, rows: slice = rows, wanted: set[tuple[str, str]] = wanted
        ) -> None:
            mlp = group[index]
            if (mlp.module, side) not in wanted:
                raise DLRError(
                    f"{mlp.module} is called more than once in a pass: such a module cannot be replaced"
                )
            part = held[index].x if side == "input" else held[index].y
            checked_store(part[rows], value, f"the {side} of {mlp.module if side == 'input' else mlp.output}")
            wanted.remove((mlp.module, side))
            if not wanted:
                raise _Stop

        _forward(model, group, batch, keep)
        if wanted:
            raise DLRError(f"{min(wanted)[0]} is not called in every pass: leave it out of --layers")
        if progress is not None:
            progress(min(begin + at_once, sequences), sequences)


def checked_store(part: Tensor, value: Any, what: str) -> None:
    """Copies value [..., d] to part [rows, d], casting it. Raises DLRError where it does not fit or is not finite."""
    if not isinstance(value, Tensor) or value.shape[-1] != part.shape[-1] or value.numel() != part.numel():
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise DLRError(f"{what} is {shape}, not one row of {part.shape[-1]} for each of {len(part)} tokens")
    part.copy_(value.reshape(part.shape))
    if not part.isfinite().all():
        if value.isfinite().all():
            raise DLRError(f"{what} exceeds the range of {part.dtype}: capture in bfloat16 or float32")
        raise DLRError(f"{what} contains NaN or infinity: are the model's weights sound?")


def _check_calls(model: PreTrainedModel, mlps: Sequence[MLP], tokens: Tensor) -> None:
    """Run a few tokens through the whole body and count how often each MLP is called, before the work starts.

    (Later passes stop behind the last MLP of their group and would miss a second call, as in ALBERT.)
    """
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
    """One forward pass of the body; calls keep(index of the MLP, "input" or "output", value) for each."""

    def before(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(index, "input", args[0] if args else next(iter(kwargs.values()), None))

        return hook

    def after(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            keep(index, "output", output)

        return hook

    hooks = []
    try:
        for index, mlp in enumerate(mlps):
            hooks.append(
                _module(model, mlp.module).register_forward_pre_hook(before(index), with_kwargs=True)
            )
            hooks.append(_module(model, mlp.output).register_forward_hook(after(index)))
        with frozen(model):
            run_body(model, tokens)
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise DLRError(f"the model has no module {name}") from error
