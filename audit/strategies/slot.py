"""One MLP slot in training, with the chain and with the MLP that it replaced, by any strategy."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ...common.errors import DLRError
from ...microbench.slot import Case, DenseWeights, Slot
from ...runtime import DLRSpec
from ...triton_kernels import ChainWeights, dlr_net
from ..meters import Counts, StepCounts, StepSeconds, count, count_step, device_peak, recorded, time_step
from .compiled import compiler_errors
from .lora import new_adapter
from .slot_strategies import ADAPTER_RANK, Strategy, adapter_rank, chain_strategies, mlp_strategies


@dataclass(frozen=True, slots=True)
class Row:
    """What a strategy costs. saved: bytes, see StepCounts. device_peak: bytes that a GPU's allocator saw at the peak.
    None: not counted, as of a compiled step; not timed; no GPU; or, with `error`, failed."""

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
class Variant:
    """One of the two: x [T, d] of a slot, its weights, and the forward passes that inference has."""

    x: Tensor
    weights: ChainWeights | DenseWeights
    strategies: list[Strategy]
    adapter_rank: int
    inference: dict[str, Callable[[Tensor], Tensor]]

    def strategy(self, name: str) -> Strategy:
        """The strategy of that name; raises DLRError on another."""
        for strategy in self.strategies:
            if strategy.name == name:
                return strategy
        raise DLRError(f"no strategy {name!r}; one of {', '.join(p.name for p in self.strategies)}")

    def prepare(self, strategy: Strategy) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
        """The strategy's forward pass on weights of its own, and what it trains of them."""
        train = strategy.trainable == "weights"
        own = {
            n: w.detach().requires_grad_(train)
            for n, w in self.weights._asdict().items()
            if isinstance(w, Tensor)
        }
        weights, tensors = self.weights._replace(**own), list(own.values())
        if strategy.trainable != "adapters":
            return partial(_on, strategy.run, weights), tensors if train else []
        adapters = [new_adapter(w, self.adapter_rank) for w in tensors if w.dim() > 1]
        run = partial(strategy.run, adapters=adapters)
        return partial(_on, run, weights), [t for pair in adapters for t in pair]

    def count_inference(self, name: str) -> Counts:
        """What one inference pass dispatches."""
        with torch.no_grad():
            return count(lambda: self.inference[name](self.x))


def variants(
    spec: DLRSpec, intermediate: int, *, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Variant, Variant]:
    """(locked, original): the chain and a SwiGLU MLP of width `intermediate`, of random weights, on random tokens."""
    slot = Slot(Case(spec, intermediate, tokens), device, dtype, cold_bytes=0)
    chain, mlp = slot.chain[0], slot.dense[0]
    strategies = chain_strategies(spec)
    runtime = partial(_on, partial(dlr_net, gram=slot.gram[0]), chain)
    plain = partial(_on, strategies[0].run, chain)
    locked = Variant(slot.x, chain, strategies, adapter_rank(spec), {"reference": plain, "runtime": runtime})
    strategies = mlp_strategies(spec.hidden_size)
    inference = {"reference": partial(_on, strategies[0].run, mlp)}
    return locked, Variant(slot.x, mlp, strategies, ADAPTER_RANK, inference)


def _on(run: Callable[..., Tensor], weights: ChainWeights | DenseWeights, x: Tensor) -> Tensor:
    return run(x, weights)


def counted_variants(
    spec: DLRSpec, intermediate: int, *, tokens: int, dtype: torch.dtype
) -> tuple[list[Row], list[Row]]:
    """(locked, original): every strategy but the compiled ones counted, on tensors without data: any size, no time."""
    with FakeTensorMode():
        locked, original = variants(
            spec, intermediate, tokens=tokens, dtype=dtype, device=torch.device("cpu")
        )
        return rows(locked), rows(original)


def rows(variant: Variant, strategies: Iterable[Strategy] | None = None, *, repeats: int = 0) -> list[Row]:
    """A row for each strategy, by default all that can be counted; timed where repeats > 0."""
    chosen: Sequence[Strategy] = (
        [p for p in variant.strategies if not p.compiled] if strategies is None else list(strategies)
    )
    return [measure(variant, strategy, repeats=repeats) for strategy in chosen]


def measure(variant: Variant, strategy: Strategy, *, repeats: int = 0) -> Row:
    """The strategy's row. A compiled step is not counted, but for what autograd saves of it."""
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
        return Row(strategy.name, strategy.trainable, error=str(error))
    return Row(strategy.name, strategy.trainable, saved, counts, seconds, peak)
