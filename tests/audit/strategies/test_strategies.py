"""Every way to train a slot gives the gradients of plain autograd, in float64, and costs what its formula says."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dlr_lock.audit.strategies.checkpoint import segmented
from dlr_lock.audit.strategies.compiled import compiled
from dlr_lock.audit.strategies.inversion import inverted
from dlr_lock.audit.strategies.lookahead import lookahead_trained
from dlr_lock.audit.strategies.lora import adapted_chain, adapted_mlp, merged_chain, new_adapter
from dlr_lock.audit.strategies.slot import StrategyCost, slot_cost, slot_variants
from dlr_lock.audit.strategies.steps import lanes_of, parts, read
from dlr_lock.audit.strategies.table import (
    STRATEGIES,
    Strategy,
    best_segment,
    model_strategies,
    slot_strategies,
)
from dlr_lock.common.errors import DLRError
from dlr_lock.microbench.slot import DenseWeights, dense_mlp
from dlr_lock.runtime import DLRSpec
from dlr_lock.triton_kernels import ACTIVATIONS, ChainWeights, chain_reference

CHAINS = {
    "single": DLRSpec(24, 1, 5, 16),
    "lanes": DLRSpec(24, 3, 5, 32, act="gelu"),
}
GATED = DLRSpec(24, 2, 9, 16, gated=True)  # of a student, which is trained by the definition alone
plain_chains = pytest.mark.parametrize("spec", CHAINS.values(), ids=CHAINS)
Weights = ChainWeights | DenseWeights


def chain(spec: DLRSpec, dtype: torch.dtype = torch.float64) -> ChainWeights:
    """Strongly coupled: the updates are about as large as x."""
    d, inner = spec.hidden_size, spec.depth * spec.rank
    names = ("A", "B", "G")[: spec.matrices]
    weights = {
        n: torch.randn(spec.weight_shape, dtype=dtype) * (inner if n == "B" else d) ** -0.5 for n in names
    }
    vectors = {n: torch.randn(d, dtype=dtype) for n in ("scale", "bias")}
    return ChainWeights(**weights, **vectors, act=spec.act)


def tensors(weights: Weights) -> list[Tensor]:
    return [w for w in weights if isinstance(w, Tensor)]


def mapped(weights: Weights, change: Callable[[Tensor], Tensor]) -> Any:
    changed = {n: change(w) for n, w in weights._asdict().items() if isinstance(w, Tensor)}
    return weights._replace(**changed)


def gradients(function: Any, x: Tensor, weights: Weights, dy: Tensor, **more: Any) -> list[Tensor]:
    """y, and the gradients of x and of the weights that want one."""
    leaf = x.detach().requires_grad_()
    wanted = [w for w in tensors(weights) if w.requires_grad]
    wanted += [t for adapter in more.get("adapters", ()) for t in adapter]
    y = function(leaf, weights, **more)
    return [y, *torch.autograd.grad(y, [leaf, *wanted], dy)]


def error(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest RMS ratio."""
    assert len(got) == len(wanted)
    return max(
        ((a.double() - b.double()).norm() / b.double().norm()).item()
        for a, b in zip(got, wanted, strict=True)
    )


def strategies(trainable: str) -> list[Any]:
    return [
        pytest.param(spec, p, id=f"{name}-{p.name}")
        for name, spec in (CHAINS | {"gated": GATED}).items()
        for p in slot_strategies(spec)
        if p.trainable == trainable and not p.compiled
        if not spec.gated or p.form is None or p.name == "LoRA, merged"
    ]


@pytest.mark.parametrize(("spec", "strategy"), strategies("weights") + strategies("nothing"))
def test_gradients_are_plain_autograd_s(spec: DLRSpec, strategy: Strategy) -> None:
    weights, x, dy = chain(spec), torch.randn(2, 6, 24).double(), torch.randn(2, 6, 24).double()
    weights = mapped(weights, lambda w: w.requires_grad_(strategy.trainable == "weights"))
    wanted = gradients(chain_reference, x, weights, dy)
    assert error(gradients(strategy.chain(spec), x, weights, dy), wanted) < 1e-12


@pytest.mark.parametrize("form", [lookahead_trained, partial(lookahead_trained, recompute=True), inverted])
@pytest.mark.parametrize("block", [1, 32, 64, 80, 1000])
@plain_chains
def test_gradients_of_blocks_that_do_and_do_not_divide_a_lane(spec: DLRSpec, block: int, form: Any) -> None:
    weights = mapped(chain(spec), Tensor.requires_grad_)
    x, dy = torch.randn(6, 24).double(), torch.randn(6, 24).double()
    wanted = gradients(chain_reference, x, weights, dy)
    assert error(gradients(partial(form, block=block), x, weights, dy), wanted) < 1e-12


@pytest.mark.parametrize(("spec", "strategy"), strategies("adapters"))
def test_adapters_have_the_gradients_of_the_merged_chain(spec: DLRSpec, strategy: Strategy) -> None:
    weights, x, dy = chain(spec), torch.randn(6, 24).double(), torch.randn(6, 24).double()
    adapters = [new_adapter(w, 4) for w in tensors(weights) if w.dim() > 1]
    for V, _ in adapters:
        torch.nn.init.normal_(V, std=0.1)
    plain = partial(merged_chain, form=chain_reference)
    wanted = gradients(plain, x, weights, dy, adapters=adapters)
    assert error(gradients(strategy.chain(spec), x, weights, dy, adapters=adapters), wanted) < 1e-12
    y = adapted_chain(x, weights, adapters=[new_adapter(w, 4) for w in tensors(weights) if w.dim() > 1])
    assert error([y], [chain_reference(x, weights)]) < 1e-13  # a new adapter changes nothing


@pytest.mark.parametrize(
    "strategy", [p for p in slot_strategies(None) if not p.compiled], ids=lambda p: p.name
)
def test_gradients_of_the_mlp_s_strategies(strategy: Strategy) -> None:
    gate, up, down = (torch.randn(*shape).double() for shape in ((40, 24), (40, 24), (24, 40)))
    weights = DenseWeights(gate, up, down)
    x, dy = torch.randn(6, 24).double(), torch.randn(6, 24).double()
    if strategy.trainable == "adapters":
        adapters = [new_adapter(w, 4) for w in weights]
        for V, _ in adapters:
            torch.nn.init.normal_(V, std=0.1)

        def merged(x: Tensor, weights: DenseWeights, adapters: list) -> Tensor:
            return dense_mlp(
                x, DenseWeights(*(w + V @ U for w, (V, U) in zip(weights, adapters, strict=True)))
            )

        wanted = gradients(merged, x, weights, dy, adapters=adapters)
        got = gradients(strategy.mlp(24), x, weights, dy, adapters=adapters)
        assert error(gradients(adapted_mlp, x, weights, dy, adapters=adapters), wanted) < 1e-12
    else:
        weights = mapped(weights, lambda w: w.requires_grad_(strategy.trainable == "weights"))
        wanted = gradients(dense_mlp, x, weights, dy)
        got = gradients(strategy.mlp(24), x, weights, dy)
    assert error(got, wanted) < 1e-12


@pytest.mark.parametrize("form", [lookahead_trained, inverted, partial(inverted, block=64)])
def test_bf16_weights_lose_no_more_than_plain_training_does(form: Any) -> None:
    spec = DLRSpec(96, 2, 16, 16)
    weights = mapped(chain(spec), lambda w: w.bfloat16() if w.dim() > 1 else w.float())
    weights = mapped(weights, Tensor.requires_grad_)
    x, dy = torch.randn(64, 96), torch.randn(64, 96)
    exact = mapped(weights, lambda w: w.detach().double().requires_grad_())
    wanted = gradients(chain_reference, x.double(), exact, dy.double())
    plain = error(gradients(chain_reference, x, weights, dy), wanted)
    assert error(gradients(form, x, weights, dy), wanted) < 1.5 * plain < 0.1


def rebuild_error(x: Tensor, weights: ChainWeights, state: torch.dtype) -> float:
    """How far x, rebuilt from the chain's end in a state of dtype `state`, is from x: the RMS ratio, in all lanes.

    What the steps read is kept in the weights' dtype, and is the same both ways: the error is that of adding and
    subtracting.
    """
    start = z = lanes_of(x, weights).to(state)
    updates = []
    for A, B in parts(weights, 1):
        h = ACTIVATIONS[weights.act](read(z, A.flatten(1, 2)))
        updates.append(torch.bmm(h, B.flatten(1, 2)).to(state))
        z = z + updates[-1]
    for update in reversed(updates):
        z = z - update
    start, z = start.double(), z.double()
    return ((z - start).square().mean() / start.square().mean()).sqrt().item()


def test_what_is_rebuilt_is_exact_to_the_state_s_rounding() -> None:
    weights, x = chain(DLRSpec(96, 2, 48, 16), torch.float32), torch.randn(64, 96)
    errors = {dtype: rebuild_error(x, weights, dtype) for dtype in (torch.float32, torch.bfloat16)}
    # One rounding a step and way: sqrt(2 * 48) * eps / sqrt(12), times how much larger z is than x (here below 3).
    assert errors[torch.float32] < 1e-6
    assert 2e-3 < errors[torch.bfloat16] < 0.1
    assert errors[torch.bfloat16] > 1e4 * errors[torch.float32]


def test_shapes_that_are_no_chain_are_refused() -> None:
    weights = chain(CHAINS["single"])
    for form in (partial(segmented, steps=2), lookahead_trained, inverted):
        with pytest.raises(ValueError, match="do not fit a chain"):
            form(torch.randn(3, 25).double(), weights)


def test_gated_steps_are_refused_but_by_the_definition() -> None:
    weights = chain(GATED)
    for form in (partial(segmented, steps=2), lookahead_trained, inverted):
        with pytest.raises(ValueError, match="gated steps are trained step by step"):
            form(torch.randn(3, 24).double(), weights)


def test_the_table_serves_slots_and_models() -> None:
    """An entry has every name once, and stands where it is of use."""
    spec = DLRSpec(512, 1, 30, 64)
    for found in (
        slot_strategies(spec),
        slot_strategies(None),
        *(model_strategies(locked=b) for b in (True, False)),
    ):
        assert len({s.name for s in found}) == len(found)
        for trainable in {s.trainable for s in found}:
            assert next(s for s in found if s.trainable == trainable).name.endswith("plain")
    in_model = {s.name for s in model_strategies(locked=True)}
    assert {s.name for s in model_strategies(locked=False)} < in_model
    assert "layer checkpoint, look-ahead 256, inverted" in in_model and "LoRA, segments" in in_model
    entry = Strategy("own", wrap=lambda forward, hidden_size: forward)
    STRATEGIES.append(entry)
    try:
        for found in (slot_strategies(spec), slot_strategies(None), model_strategies(locked=True)):
            assert {"own", "LoRA, own"} <= {s.name for s in found}
        assert "LoRA on attention, own" in {s.name for s in slot_strategies(spec)}
    finally:
        STRATEGIES.remove(entry)


# What a strategy keeps and computes, against the formulas of its docstring: float32, so that state and weights weigh
# the same, and the whole FLOPs of three forward passes for plain training.
TOKENS, FEATURES, WIDTH = 1024, 512, 1024


def row(spec: DLRSpec, strategy: str, *, original: bool = False) -> StrategyCost:
    with FakeTensorMode():
        pair = slot_variants(spec, WIDTH, tokens=TOKENS, dtype=torch.float32, device=torch.device("cpu"))
        return slot_cost(pair[original], pair[original].strategy(strategy))


@pytest.mark.parametrize("lanes", [1, 4])
def test_costs_of_the_chain_s_strategies(lanes: int) -> None:
    spec = DLRSpec.matching(FEATURES, WIDTH, mlp_gated=True, lanes=lanes, depth=24 // lanes)
    d, K, reads = FEATURES, spec.depth, lanes * spec.depth * spec.rank  # L K r = 1.5 f
    assert (reads, spec.rank) == (1536, 64)
    forward = 2 * TOKENS * 2 * reads * d
    sums = d  # the sum of the lanes' updates, kept for the gradient of scale
    segment = best_segment(spec)
    kept = {
        "plain": (lanes * K * d - (lanes - 1) * d + 2 * reads + sums, 3.0),
        "checkpoint": (d, 4.0),
        "selective": (d + reads, 3.5),
        "inversion": (lanes * d + reads, 3.5),
        "nested": (d, 5.0),
        "segments": ((-(-K // segment) - 1) * lanes * d + d + sums, 4.0),
        "checkpoint, inverted": (d, 4.5),
    }
    for strategy, (elements, forwards) in kept.items():
        counts = row(spec, strategy).counts
        assert counts is not None
        assert counts.held == 4 * TOKENS * elements, strategy
        # A replay ends with what the backward pass wants: the last product of a segment is not made again.
        last = (
            forward
            / K
            / 2
            * (-(-K // segment) if "," in strategy or strategy in ("segments", "nested") else 1)
        )
        assert forwards * forward - 2 * last <= counts.flops <= forwards * forward, strategy
        if "checkpoint" not in strategy and "nested" not in strategy and "seg" not in strategy:
            assert counts.flops == forwards * forward, strategy


@pytest.mark.parametrize("lanes", [1, 4])
def test_costs_of_look_ahead(lanes: int) -> None:
    spec = DLRSpec.matching(FEATURES, WIDTH, mlp_gated=True, lanes=lanes, depth=48 // lanes)
    d, lane, reads, m = FEATURES, spec.depth * spec.rank, 1536, 128
    blocks = lane // m
    gram = lanes * blocks * m * m  # elements, whatever the tokens
    plain = 3 * 2 * TOKENS * 2 * reads * d
    wide, back = row(spec, f"look-ahead {m}").counts, row(spec, f"look-ahead {m}, inverted").counts
    assert wide is not None and back is not None
    states = 4 * TOKENS * (lanes * blocks * d - (lanes - 1) * d + 2 * reads + d)
    assert states < wide.held <= states + 4 * gram + blocks * m * m  # Gram blocks, and their masks in bytes
    assert back.held == 4 * TOKENS * (lanes * d + reads)
    redone = row(spec, f"look-ahead {m}, recomputed").counts
    assert redone is not None
    assert redone.held == 4 * TOKENS * (lanes * blocks * d - (lanes - 1) * d + d)
    assert 1.1 < redone.flops / wide.flops < 4 / 3
    assert 1 < wide.flops / plain < 1.02 + m / (3 * d) + m * reads / (TOKENS * reads)
    assert 7 / 6 < back.flops / plain < 7 / 6 + 0.02 + m / (3 * d) + m * reads / (TOKENS * reads)


def test_costs_of_the_mlp_s_strategies() -> None:
    spec = DLRSpec.matching(FEATURES, WIDTH, mlp_gated=True)
    forward = 2 * TOKENS * 3 * FEATURES * WIDTH
    for strategy, elements, forwards in (
        ("plain", FEATURES + 4 * WIDTH, 3),
        ("checkpoint", FEATURES, 3 + 2 / 3),  # down is not made again
        ("selective", FEATURES + 2 * WIDTH, 3),
        ("LoRA on attention, plain", 3 * WIDTH, 2),
    ):
        counts = row(spec, strategy, original=True).counts
        assert counts is not None
        assert counts.held == 4 * TOKENS * elements, strategy
        assert counts.flops == pytest.approx(forwards * forward), strategy


def test_the_best_segment_is_the_best() -> None:
    spec = DLRSpec(512, 3, 30, 16)
    with FakeTensorMode():
        variant, _ = slot_variants(
            spec, WIDTH, tokens=TOKENS, dtype=torch.float32, device=torch.device("cpu")
        )
        peaks = {}
        for steps in (1, 2, 4, 5, 6, 10, 30):
            counts = slot_cost(
                variant, Strategy("", lambda spec, steps=steps: partial(segmented, steps=steps))
            ).counts
            assert counts is not None
            peaks[steps] = counts.peak
    assert best_segment(spec) in peaks and peaks[best_segment(spec)] <= 1.05 * min(peaks.values())
    assert peaks[30] > 2 * min(peaks.values()) and peaks[1] > 1.5 * min(peaks.values())


def test_compiled_gradients_and_budget() -> None:
    """On a CPU this wants a C++ compiler."""
    spec = DLRSpec(32, 1, 2, 16)
    variant, _ = slot_variants(spec, 48, tokens=8, dtype=torch.float32, device=torch.device("cpu"))
    strategy = Strategy("", wrap=lambda forward, _: compiled(forward, memory_budget=0.5), compiled=True)
    got, plain = slot_cost(variant, strategy), slot_cost(variant, variant.strategy("plain"))
    if got.error is not None:
        pytest.skip(got.error)
    assert got.saved is not None and plain.saved is not None and got.saved < plain.saved
    assert got.counts is None and got.memory() is None
    weights = mapped(variant.weights, Tensor.requires_grad_)
    dy = torch.randn(8, 32)
    wanted = gradients(chain_reference, variant.x, weights, dy)
    assert error(gradients(strategy.chain(spec), variant.x, weights, dy), wanted) < 1e-5


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    variant, _ = slot_variants(
        DLRSpec(16, 1, 1, 16), 8, tokens=3, dtype=torch.float32, device=torch.device("cpu")
    )
    failed = slot_cost(variant, variant.strategy("compiled"))
    assert failed.counts is None and failed.seconds is None
    assert failed.error is not None and failed.error.startswith("torch.compile failed")


def test_an_unknown_strategy_is_named() -> None:
    variant, _ = slot_variants(
        DLRSpec(16, 1, 1, 16), 8, tokens=3, dtype=torch.float32, device=torch.device("cpu")
    )
    with pytest.raises(DLRError, match="no strategy 'plane'; one of plain, checkpoint"):
        variant.strategy("plane")
