"""Teacher activations: what goes into each MLP and what comes out of it, on the calibration text.

A pass over the text serves as many layers as fit into the memory budget and ends right behind the last of
them. A layer that does not fit alone is kept in memory-mapped files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...common.dtypes import fast_products
from ...common.errors import DLRError
from ...common.hooks import StopForward, submodule, watch_pass
from ...common.micro_batch import MicroBatch
from ...common.progress import Count, no_count
from ...common.weights import checked_store
from ..experts.routing import read_call, read_output
from .pairs import Activations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..mlp_matching import MLP


BATCH_TOKENS = 4096  # in one forward pass: products are busy, and little is held beside the activations kept
_TRIAL_TOKENS = 8  # in the pass that tells whether every MLP is called exactly once


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
        size = held_bytes(mlp, tokens, dtype)
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
    if not mlps or not len(tokens):
        return
    micro = micro or MicroBatch("the reading of activations", "sequence")
    check_calls(model, mlps, tokens)
    for group in group_layers(mlps, tokens.numel(), max_memory, dtype):
        place = scratch if held_bytes(group[0], tokens.numel(), dtype) > max_memory else None
        with captured(model, group, tokens, place, dtype, progress, micro) as held:
            for mlp, activations in zip(group, held, strict=True):
                yield mlp, activations
                activations.close()


@contextmanager
def captured(
    model: PreTrainedModel,
    mlps: Sequence[MLP],
    tokens: Tensor,
    place: Path | None,
    dtype: torch.dtype,
    progress: Count,
    micro: MicroBatch,
) -> Iterator[list[Activations]]:
    """Each MLP's activations, all by one pass, until the end of the block.

    place: The folder of their files; None to have them in memory. The rest, and what is raised, is as of `capture`, but
    `check_calls` is to come first, and there may be no tokens.
    """
    held: list[Activations] = []
    try:
        for mlp in mlps:
            held.append(Activations.empty(tokens, mlp.hidden_size, dtype, place))
        _fill(model, mlps, held, tokens, progress, micro)
        yield held
    finally:
        for activations in held:
            activations.close()


def batch_of(n: int) -> int:
    """Sequences of n tokens in one forward pass, where the device holds them."""
    return max(1, BATCH_TOKENS // n)


def held_bytes(mlp: MLP, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Of an MLP's activations on so many tokens."""
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
    micro.each(run, sequences, batch_of(n))


def check_calls(model: PreTrainedModel, mlps: Sequence[MLP], tokens: Tensor) -> None:
    """Run a few tokens through the whole body and count how often each MLP is called, before the work starts: later
    passes stop behind the last MLP of their group and would miss a second call, as in ALBERT. tokens: the text."""
    calls = {(index, side): 0 for index in range(len(mlps)) for side in ("input", "output")}

    def count(index: int, side: str, value: Any) -> None:
        calls[index, side] += 1

    _forward(model, mlps, tokens[:1, :_TRIAL_TOKENS], count)
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
