"""Which layers to lock: what an error in each of them costs the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..common.errors import DLRError
from ..common.progress import Progress, no_progress, shown
from ..convert.data import calibration_text
from ..convert.mlp_discovery import automatic, find_mlps, ranges, select_layers, stand_ins
from ..convert.outlook.sensitivity import (
    OFF,
    Foretold,
    LayerCost,
    cheapest,
    foretelling_tokens,
    layer_costs,
    why_unknown,
)
from ..convert.source import compute_dtype, open_source
from ..reporting import Section, Table
from ..reporting.layers import bar
from .config import LayersConfig


def costs_of(source: str | Path, *, progress: Progress = no_progress, **options: Any) -> list[LayerCost]:
    """What locking each layer of a model costs, from one backward pass over a text.

    Args:
        source: A transformers directory, a hub id or a .gguf file.
        progress: Called with (what is being done, done, total).
        **options: The fields of `LayersConfig`.

    Raises:
        DLRError: On everything that the user can correct.
    """
    chosen = LayersConfig.of(options)
    config = chosen.conversion()
    device = torch.device(str(config.device))
    with shown(progress, "reading the model"):
        original = open_source(source, dtype=compute_dtype(device), device=device)
        mlps = find_mlps(original.model, config.mlps)
        stand_ins(mlps, config.layers)  # raises on layers that there are not
    tokens = chosen.tokens or foretelling_tokens(mlps)
    if why := why_unknown(original.model, mlps, tokens, whole=True):
        raise DLRError(why)
    text = calibration_text(original, replace(config, tokens=tokens), progress)
    return layer_costs(
        original.model,
        mlps,
        text.train,
        int(config.train_tokens or 0),
        seed=config.seed,
        progress=partial(progress, "a backward pass"),
    )


def foretold_of(costs: Sequence[LayerCost], layers: str | None) -> Foretold:
    """What layers cost together: those named, as `select_layers` takes them, or the cheapest N for "auto:N"."""
    if count := automatic(layers):
        layers = ranges(set(cheapest(costs, count)))
    return Foretold.of(select_layers(costs, layers))


def cost_sections(source: str, costs: Sequence[LayerCost], layers: str | None) -> list[Section]:
    """The costs as a table, drawn over the layers, and what those asked for cost together."""
    total = sum(cost.kl for cost in costs)
    longest = max(cost.kl for cost in costs)
    rows = [
        (
            str(c.layer),
            bar(c.kl, longest),
            f"{c.kl:.4f}",
            f"{c.kl / total:.1%}" if total else "-",
            f"{c.error:.3f}",
        )
        for c in costs
    ]
    columns = ("layer", "KL, drawn", "KL", "of all", "error")
    text = (
        f"{source}: the relative error that a chain will have in each layer, and the KL to the original, in nats a "
        "token, that it will cost, a layer at a time, before an end-to-end phase. From one backward pass and what was "
        f"learned of SmolLM2-135M's thirty layers, where nearly all costs are right within a factor of {OFF:g}; for "
        "51,200 to 409,600 training tokens, and chains of the MLP's size."
    )
    foretold = foretold_of(costs, layers)
    cheap = f"the cheapest {count}: " if (count := automatic(layers)) else ""
    note = f"{cheap}--layers {ranges({cost.layer for cost in foretold.layers})}, together {foretold.words}"
    return [Section("What a layer costs", text, Table(columns, rows, left=(columns[1],)), [note])]
