"""What a conversion foretells before its fits: which layers cost the model least, where that is left to it, and what
those that it locks will cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...common.errors import DLRError
from ...common.progress import say
from ..context import Context
from ..mlp_discovery import automatic, ranges, select_layers
from ..mlp_matching import MLP
from .amounts import reckoned
from .phases import foretells
from .sensitivity import Foretold, LayerCost, cheapest, foretelling_tokens, layer_costs

_PART = "layers' costs"  # of what is kept of an interrupted run


def foretell(context: Context, every: Sequence[MLP]) -> None:
    """Puts what the layers to be locked will cost into a conversion's context, and plain numbers for `--layers auto:N`.

    What `auto:N` chose by is kept beside the finished chains: an interrupted conversion goes on with the same layers,
    whatever another machine's last bits would choose. Where nothing is to be chosen, nothing is foretold if that is no
    small part of the work, or fails.

    Args:
        context: Checked; its MLPs are stand-ins where they are to be chosen.
        every: All MLPs of the model.

    Raises:
        DLRError: Where layers are to be chosen and their costs cannot be had.
    """
    count = automatic(context.config.layers)
    if not count and not (context.amounts and foretells(context.amounts)):
        return
    try:
        costs = context.ranks.agreed(
            lambda: _costs(context, every if count else context.mlps, keep=bool(count))
        )
    except DLRError as error:
        if count:
            raise
        context.notes.append(f"what the lock would cost the model could not be foretold: {error}")
        return
    if count:
        layers = ranges(set(cheapest(costs, count)))
        told = f"--layers auto:{count} chose {layers}, which of {len(costs)} layers cost the model least"
        say(context.progress, told)
        context.notes.append(told)
        context.config = replace(context.config, layers=layers)
        context.mlps = select_layers(every, layers)
        context.amounts = reckoned(context.source, context.mlps, list(every), context.config)
        costs = select_layers(costs, layers)
    context.foretold = Foretold.of(costs)
    say(
        context.progress,
        f"foretold of the locked model, before an end-to-end phase: {context.foretold.words}",
    )


def _costs(context: Context, mlps: Sequence[MLP], *, keep: bool) -> list[LayerCost]:
    """In the first process: those that are kept, or new ones. Raises DLRError as `layer_costs` does."""
    if keep and (kept := context.resume.figures(_PART)):
        return [LayerCost(**cost) for cost in kept["layers"]]
    text, config = context.text.train, context.config
    costs = layer_costs(
        context.model,
        mlps,
        text[: -(-foretelling_tokens(mlps) // text.shape[1])],
        int(config.train_tokens or 0),
        seed=config.seed,
        progress=context.count("foretelling what the layers cost"),
    )
    if keep:
        context.resume.put(_PART, {}, {"layers": [cost.to_dict() for cost in costs]})
    return costs
