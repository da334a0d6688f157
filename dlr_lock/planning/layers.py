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
from ..convert.mlp_discovery import find_mlps, ranges
from ..convert.outlook.sensitivity import OFF, LayerCost, cheapest, check_count, layer_costs, together
from ..convert.source import compute_dtype, open_source
from ..reporting import Section, Table
from ..reporting.layers import bar
from .config import LayersConfig

_TOKENS = 4096  # of text, at least


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
    hidden = max(mlp.hidden_size for mlp in mlps)
    tokens = chosen.tokens or max(_TOKENS, 4 * hidden)
    if tokens < 2 * hidden:
        raise DLRError(f"--tokens must be at least {2 * hidden}, twice the hidden size, not {tokens}")
    text = calibration_text(original, replace(config, tokens=tokens), progress)
    return layer_costs(
        original.model,
        mlps,
        text.train,
        int(config.train_tokens or 0),
        seed=config.seed,
        progress=partial(progress, "a backward pass"),
    )


def cost_sections(source: str, costs: Sequence[LayerCost], count: int | None) -> list[Section]:
    """The costs as a table, drawn over the layers, and which `count` layers are the cheapest."""
    total = sum(cost.kl for cost in costs)
    longest = max(cost.kl for cost in costs)
    rows = [
        (str(c.layer), bar(c.kl, longest), f"{c.kl:.4f}", f"{c.kl / total:.1%}", f"{c.error:.3f}")
        for c in costs
    ]
    columns = ("layer", "KL, drawn", "KL", "of all", "error")
    text = (
        f"{source}: the relative error that a chain will have in each layer, and the KL to the original, in nats a "
        "token, that it will cost, a layer at a time, before an end-to-end phase. From one backward pass and what was "
        f"learned of SmolLM2-135M's thirty layers, where nearly all costs are right within a factor of {OFF:g}."
    )
    chosen = set(cheapest(costs, count)) if count is not None else {cost.layer for cost in costs}
    note = f"all {len(costs)} layers" if count is None else f"the cheapest {count}: --layers {ranges(chosen)}"
    kl = together([cost for cost in costs if cost.layer in chosen])
    notes = [f"{note}, together a KL of about {kl:.2f}, between {kl / OFF:.2f} and {kl * OFF:.2f}"]
    return [Section("What a layer costs", text, Table(columns, rows, left=(columns[1],)), notes)]
