"""What a step of a whole model costs, counted without data and timed where it matters."""

from dataclasses import replace

import torch
from attacked import MLPS, locked_llama
from tiny import tiny_model

from dlr_lock.audit.context import ModelVariant
from dlr_lock.audit.costs import count_steps, time_steps
from dlr_lock.audit.strategies.model import model_cost
from dlr_lock.audit.strategies.table import model_strategies
from dlr_lock.triton_kernels import backend
from dlr_lock.triton_kernels.meter import count

ATTACKS = ["full", "LoRA", "MeZO"]


def test_the_rows_of_a_variant() -> None:
    model = locked_llama()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    variant = ModelVariant("locked", model, MLPS, MLPS, deep=True)
    counted = list(count_steps(variant, ATTACKS, (2, 24)))
    assert not any(row.seconds for row in counted)
    rows = time_steps(lambda: [variant], counted, (2, 24))
    assert [replace(row, seconds=None) for row in rows] == counted
    assert {row.attack for row in rows} == set(ATTACKS) and len({r.strategy for r in rows}) == len(rows)
    for attack in ATTACKS:
        mine = [row for row in rows if row.attack == attack]
        timed = [row for row in mine if row.seconds is not None]
        assert mine[0] in timed and min(r.flops for r in timed) == min(r.flops for r in mine)
        assert min(r.dependent for r in timed) == min(r.dependent for r in mine)
    # counted on tensors without data as on real ones
    ids = torch.zeros(2, 24, dtype=torch.int64)
    for strategy in model_strategies(locked=True)[:3]:
        counts = model_cost(model, MLPS, strategy, ids).counts
        row = next(r for r in rows if r.strategy == strategy.name)
        assert counts is not None and row.flops == counts.flops
        # For tensors without data transformers writes the causal mask out, and the keys and values of every head.
        for more in (row.held - counts.held, row.peak - counts.peak):
            assert 0 <= more <= 2 * 4 * (2 * 24 * 24 + 2 * 2 * 24 * 64)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_mezo_is_two_passes_of_inference() -> None:
    model = tiny_model("llama")
    (row,) = count_steps(ModelVariant("original", model, MLPS, MLPS), ["MeZO"], (2, 24))
    with torch.no_grad(), backend("naive"):
        passed = count(lambda: model(input_ids=torch.zeros(2, 24, dtype=torch.int64), use_cache=False))
    assert row.flops == 2 * passed.flops and row.held == 0


def test_adapters_of_conv1d_layers() -> None:
    names = ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    variant = ModelVariant("original", tiny_model("gpt2"), names, names)
    assert {row.attack for row in count_steps(variant, ["full", "PEFT"], (2, 24))} == {"full", "PEFT"}


def test_a_variant_without_linear_layers_has_no_row_for_adapters() -> None:
    assert list(count_steps(ModelVariant("original", tiny_model("llama"), [], []), ["PEFT"], (2, 24))) == []
