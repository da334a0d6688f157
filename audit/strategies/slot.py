"""One MLP slot in training, with the chain and with the MLP that it replaced, by any strategy."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...common.errors import DLRError
from ...microbench.slot import Case, DenseWeights, Slot, dense_mlp
from ...runtime import DLRSpec
from ...triton_kernels import ChainWeights, chain_reference, dlr_net
from ...triton_kernels.meter import Counts, count
from ..meters import StepCounts, StepSeconds, count_step, device_peak, recorded, time_step
from .compiled import compiler_errors
from .lora import new_adapter
from .table import ADAPTER_RANK, Forward, Strategy, adapter_rank, slot_strategies


@dataclass(frozen=True, slots=True)
class StrategyCost:
    """What a training step costs by one strategy. What was not measured is None, as counts are of a compiled step.

    Attributes:
        strategy, trainable: Its name, and what it trains.
        saved: Bytes, see `StepCounts`.
        counts: FLOPs, launches and bytes.
        seconds: Of the step's parts.
        device_peak: Bytes that a GPU's allocator saw at the peak.
        error: Why the step failed.
    """

    strategy: str
    trainable: str
    saved: int | None = None
    counts: StepCounts | None = None
    seconds: StepSeconds | None = None
    device_peak: int | None = None
    error: str | None = None

    def memory(self, layers: int = 1) -> int | None:
        """Bytes at the peak of training `layers` such slots one after another: each keeps what it holds for its
        backward pass, and one at a time works."""
        return None if self.counts is None else (layers - 1) * self.counts.held + self.counts.peak


@dataclass(frozen=True, slots=True)
class SlotVariant:
    """A slot with the chain, or with the MLP.

    Attributes:
        x: Its input, [T, d].
        weights: Of the chain or of the MLP.
        strategies: Those that can train it.
        forward: The forward pass of a strategy, (x, weights) -> y.
        adapter_rank: Of adapters of its matrices.
        inference: The forward passes that inference has, by name.
    """

    x: Tensor
    weights: ChainWeights | DenseWeights
    strategies: list[Strategy]
    forward: Callable[[Strategy], Forward]
    adapter_rank: int
    inference: dict[str, Callable[[Tensor], Tensor]]

    def strategy(self, name: str) -> Strategy:
        """The strategy of that name.

        Raises:
            DLRError: Where there is none.
        """
        for strategy in self.strategies:
            if strategy.name == name:
                return strategy
        raise DLRError(f"no strategy {name!r}; one of {', '.join(p.name for p in self.strategies)}")

    def prepare(self, strategy: Strategy) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
        """The strategy's forward pass on weights of its own, and what it trains of them."""
        train = strategy.trainable == "weights"
        own: dict[str, Any] = {
            n: w.detach().requires_grad_(train)
            for n, w in self.weights._asdict().items()
            if isinstance(w, Tensor)
        }
        run, weights, tensors = self.forward(strategy), self.weights._replace(**own), list(own.values())
        if strategy.trainable != "adapters":
            return partial(_on, run, weights), tensors if train else []
        adapters = [new_adapter(w, self.adapter_rank) for w in tensors if w.dim() > 1]
        return partial(_on, partial(run, adapters=adapters), weights), [t for pair in adapters for t in pair]

    def count_inference(self, name: str) -> Counts:
        """What one inference pass dispatches."""
        with torch.no_grad():
            return count(lambda: self.inference[name](self.x))


def slot_variants(
    spec: DLRSpec, intermediate: int, *, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[SlotVariant, SlotVariant]:
    """Both variants of a slot, of random weights, on random tokens.

    Args:
        spec: The chain's.
        intermediate: Width of the SwiGLU MLP that it replaced.
        tokens: T of x [T, d].
        dtype: Of weights and x.
        device: Where they are.

    Returns:
        The locked slot and the original one.
    """
    slot = Slot(Case(spec, intermediate, tokens), device, dtype, cold_bytes=0)
    chain, mlp = slot.chain[0], slot.dense[0]
    locked = SlotVariant(
        slot.x,
        chain,
        slot_strategies(spec),
        lambda strategy: strategy.chain(spec),
        adapter_rank(spec),
        {
            "reference": partial(_on, chain_reference, chain),
            "runtime": partial(_on, partial(dlr_net, gram=slot.gram[0]), chain),
        },
    )
    original = SlotVariant(
        slot.x,
        mlp,
        slot_strategies(None),
        lambda strategy: strategy.mlp(spec.hidden_size),
        ADAPTER_RANK,
        {"reference": partial(_on, dense_mlp, mlp)},
    )
    return locked, original


def _on(run: Forward, weights: ChainWeights | DenseWeights, x: Tensor) -> Tensor:
    return run(x, weights)


def slot_costs(
    variant: SlotVariant, strategies: Iterable[Strategy] | None = None, *, repeats: int = 0
) -> list[StrategyCost]:
    """The costs of strategies, by default of all that can be counted; timed where repeats > 0."""
    chosen: Sequence[Strategy] = (
        [p for p in variant.strategies if not p.compiled] if strategies is None else list(strategies)
    )
    return [slot_cost(variant, strategy, repeats=repeats) for strategy in chosen]


def slot_cost(variant: SlotVariant, strategy: Strategy, *, repeats: int = 0) -> StrategyCost:
    """What one strategy costs. A compiled step is not counted, but for what autograd saves of it."""
    function, trained = variant.prepare(strategy)
    x = variant.x.detach().requires_grad_()

    def step() -> int:
        with recorded(trained) as saved:
            y = function(x)
        kept = sum(saved.values())
        torch.autograd.grad(y, [x, *trained], torch.ones_like(y), allow_unused=True)
        return kept

    counts = seconds = peak = None
    try:
        with compiler_errors():
            if strategy.compiled:
                saved = step()
            else:
                counts = count_step(function, x, trained)
                saved = counts.saved
            if repeats:
                seconds = time_step(function, x, trained, repeats=repeats)
                peak = device_peak(step, x.device)
    except DLRError as error:
        return StrategyCost(strategy.name, strategy.trainable, error=str(error))
    return StrategyCost(strategy.name, strategy.trainable, saved, counts, seconds, peak)
