"""Teacher activations of modules that are dealt out to processes: captured by all together, sent to who fits them.

Each process alone would lead the whole text up to its own modules. Here each leads every so many-th batch of it, for
the modules of all, and what it finds at a module goes to the module's process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...common.micro_batch import MicroBatch
from ...common.progress import Count, no_count
from ..experts.routing import Mixture, Routing
from ..parallel.ranks import Ranks
from ..parallel.share import Batches
from .capture import batch_of, captured, check_calls, held_bytes
from .pairs import Activations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..mlp_matching import MLP


def most_led(tokens: int, n: int, processes: int) -> int:
    """Of a text of sequences of n tokens, in batches, what the first process leads, which has the most of it."""
    batch = batch_of(n) * n
    return min(tokens, -(-tokens // (batch * processes)) * batch)


def at_once(
    hands: Sequence[Sequence[MLP]],
    tokens: int,
    led: int,
    max_memory: int,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """For how many of its own modules each process has room at once; 0 where for one they must lie in files.

    While they are sent, a process holds what it has led of those of all that are still to be sent, and all of its own
    that it has got: of as many batches as there are processes, or of many, that is one module more than are its own.

    Args:
        hands: Each process's modules.
        tokens: Of the whole text.
        led: Of it, those that one process leads at most.
        max_memory: Bytes that a process may hold.
        dtype: Of the activations.
    """
    largest = max((held_bytes(mlp, 1, dtype) for hand in hands for mlp in hand), default=1)
    busy = sum(map(bool, hands))
    return max(0, max_memory - largest * tokens) // (largest * max(tokens, busy * led))


def waves(hands: Sequence[Sequence[MLP]], each: int) -> list[list[list[MLP]]]:
    """Which modules are captured together: of each process the next ones, so many or, where it is 0, one; a process
    may have none. hands: each process's."""
    step = max(1, each)
    return [
        [list(hand[begin : begin + step]) for hand in hands] for begin in range(0, max(map(len, hands)), step)
    ]


def capture_dealt(
    model: PreTrainedModel,
    hands: Sequence[Sequence[MLP]],
    tokens: Tensor,
    ranks: Ranks,
    *,
    max_memory: int,
    scratch: Path,
    dtype: torch.dtype = torch.bfloat16,
    progress: Count = no_count,
    micro: MicroBatch | None = None,
) -> Iterator[tuple[MLP, Activations]]:
    """What goes into each of this process's MLPs and what comes out of it, on the whole text.

    All processes must go through it to its end: also one that has no MLP takes its part of the text.

    Args:
        hands: Each process's MLPs, the same in every process.
        tokens: [S, n] int64, the whole text.
        ranks: The processes.
        model, max_memory, scratch, dtype, progress, micro: As for `capture`.

    Yields:
        Each MLP of this process, with its activations, which are released when the next ones are asked for. They are
        the bits of one process, as long as the device holds batches of the same size.

    Raises:
        DLRError: As `capture` does, and where another process has ended.
    """
    every = [mlp for hand in hands for mlp in hand]
    if not every:
        return
    micro = micro or MicroBatch("the reading of activations", "sequence")
    check_calls(model, every, tokens)
    n = tokens.shape[1]
    batches = Batches(ranks, tokens, batch_of(n))
    each = at_once(hands, tokens.numel(), most_led(tokens.numel(), n, ranks.size), max_memory, dtype)
    place = None if each else scratch
    for wave in waves(hands, each):
        together = [mlp for hand in wave for mlp in hand]
        own: list[tuple[MLP, Activations]] = []
        try:
            with captured(model, together, batches.tokens, place, dtype, progress, micro) as held:
                parts = {mlp.module: part for mlp, part in zip(together, held, strict=True)}
                for turn in range(max(map(len, wave))):
                    of = [hand[turn] if turn < len(hand) else None for hand in wave]
                    for width in sorted({mlp.hidden_size for mlp in of if mlp}):
                        same = [mlp if mlp and mlp.hidden_size == width else None for mlp in of]
                        own += _sent(batches, same, parts, tokens, place)
            for mlp, pairs in own:
                yield mlp, pairs
                pairs.close()
        finally:
            for _, pairs in own:
                pairs.close()


def _sent(
    batches: Batches,
    of: Sequence[MLP | None],
    parts: dict[str, Activations],
    tokens: Tensor,
    place: Path | None,
) -> list[tuple[MLP, Activations]]:
    """Of one module for each process, or of none, what was captured goes to that process; this process's own comes
    back, whole."""
    ranks, whole = batches.ranks, torch.arange(tokens.numel())
    # In an order in which as many come from each process: of a batch all would come from one.
    order = batches.places(whole)[1].argsort(stable=True)
    sources = [parts[mlp.module] for mlp in of if mlp]
    takes = [parts[mlp.module].rows if mlp else sources[0].rows for mlp in of]
    got: list[tuple[MLP, Activations]] = []
    own = of[ranks.rank]
    if own:
        pairs = Activations.empty(tokens, own.hidden_size, sources[0].x.dtype, place)
        got.append((own, pairs))
    for at, part in batches.sent(takes, [order if mlp else order[:0] for mlp in of]):
        if own:
            pairs.x[order[at]], pairs.y[order[at]] = part
            pairs.forget()
    for mlp in of:
        if isinstance(mlp, Mixture):
            part = parts[mlp.module].routing or Routing(
                torch.zeros(0, mlp.chosen, dtype=torch.int64), torch.zeros(0, mlp.chosen)
            )
            routing = Routing(*(batches.whole(numbers) for numbers in part))
            if mlp is own:
                pairs.routing = routing
    for mlp in of:
        if mlp:
            parts[mlp.module].close()
    return got
