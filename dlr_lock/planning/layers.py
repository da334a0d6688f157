"""Which layers to lock: what an error in each of them costs the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..common.progress import Progress, no_progress, shown
from ..convert.data import calibration_text
from ..convert.mlp_discovery import find_mlps, ranges
from ..convert.outlook.sensitivity import ERROR, LayerCost, cheapest, check_count, layer_costs
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
        check_count(chosen.count, len({mlp.layer for mlp in mlps}))
    text = calibration_text(original, config, progress)
    return layer_costs(
        original.model, mlps, text.train, seed=config.seed, progress=partial(progress, "a backward pass")
    )


def cost_sections(source: str, costs: Sequence[LayerCost], count: int | None) -> list[Section]:
    """The costs as a table, drawn over the layers, and which `count` layers are the cheapest."""
    total = sum(cost.kl for cost in costs)
    longest = max(cost.kl for cost in costs)
    rows = [
        (str(cost.layer), bar(cost.kl, longest), f"{cost.kl:.4f}", f"{cost.kl / total:.1%}") for cost in costs
    ]
    columns = ("layer", "KL, drawn", "KL", "of all")
    text = (
        f"{source}: the KL to the original, in nats a token, that chains with a relative error of {ERROR:g} would "
        f"cost, a layer at a time; all together about {total:.2f}, for such costs add up. From one backward pass; "
        "within a factor of 1.4 of what chains cost the thirty layers of SmolLM2-135M."
    )
    notes = []
    if count is not None:
        chosen = cheapest(costs, count)
        share = sum(cost.kl for cost in costs if cost.layer in chosen)
        notes.append(f"the cheapest {count}: --layers {ranges(set(chosen))}, {share:.2f}")
    return [Section("What a layer costs", text, Table(columns, rows, left=(columns[1],)), notes)]
