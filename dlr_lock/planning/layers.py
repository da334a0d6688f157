"""Which layers to lock: what an error in each of them costs the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..common.errors import DLRError
from ..common.progress import Progress, no_progress
from ..convert.config import ConversionConfig
from ..convert.data import calibration_text
from ..convert.mlp_discovery import find_mlps, ranges
from ..convert.outlook.sensitivity import ERROR, LayerCost, cheapest, layer_costs
from ..convert.source import compute_dtype, open_source
from ..reporting import Section, Table
from ..reporting.layers import bar


def costs_of(
    source: str | Path, *, count: int | None = None, progress: Progress = no_progress, **options: Any
) -> list[LayerCost]:
    """What locking each layer of a model costs, from one backward pass over a text.

    Args:
        source: A transformers directory, a hub id or a .gguf file.
        count: How many layers are to be locked, which is checked; None for any number.
        progress: Called with (what is being done, done, total).
        **options: Of the fields of `ConversionConfig` data, tokens, sequence, mlps, device and seed.

    Raises:
        DLRError: On everything that the user can correct.
    """
    config = ConversionConfig.of(options | {"heldout": 2}).resolved()
    device = torch.device(str(config.device))
    progress("reading the model", 0, 1)
    original = open_source(source, dtype=compute_dtype(device), device=device)
    mlps = find_mlps(original.model, config.mlps)
    progress("reading the model", 1, 1)
    layers = len({mlp.layer for mlp in mlps})
    if count is not None and not 1 <= count <= layers:
        raise DLRError(f"--count must be from 1 to {layers}, the layers that have MLPs, not {count}")
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
        f"{source}: the KL to the original, in nats a token, that chains with a relative error of {ERROR:g} would cost, "
        f"a layer at a time. All together about {total:.2f}, for such costs add up. From one backward pass; within a "
        "factor of 1.4 of what chains cost the thirty layers of SmolLM2-135M."
    )
    notes = []
    if count is not None:
        chosen = cheapest(costs, count)
        share = sum(cost.kl for cost in costs if cost.layer in chosen)
        notes.append(f"the cheapest {count}: --layers {ranges(set(chosen))}, {share:.2f}")
    return [Section("What a layer costs", text, Table(columns, rows, left=(columns[1],)), notes)]
