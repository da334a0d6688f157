"""One MLP slot in training, with the chain and with the MLP that it replaced, by any policy."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ...runtime import DLRError, DLRSpec
from ...runtime.slot import Case, Slot
from ...triton_kernels import dlr_net
from ..meters import Counts, StepCounts, StepSeconds, count, count_step, device_peak, recorded, time_step
from .compiled import compiler_errors
from .lora import new_adapter
from .policies import ADAPTER_RANK, Policy, adapter_rank, chain_policies, mlp_policies


@dataclass(frozen=True, slots=True)
class Row:
    """What a policy costs. saved: bytes, see StepCounts. device_peak: bytes that a GPU's allocator saw at the peak.
    None: not counted, as of a compiled step; not timed; no GPU; or, with `error`, failed."""

    policy: str
    aim: str
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
class Arm:
    """One of the two: x [T, d] of a slot, its weights by name, and the forward passes that inference has."""

    x: Tensor
    weights: dict[str, Tensor]
    policies: list[Policy]
    adapter_rank: int
    inference: dict[str, Callable[[Tensor], Tensor]]

    def policy(self, name: str) -> Policy:
        """The policy of that name; raises DLRError on another."""
        for policy in self.policies:
            if policy.name == name:
                return policy
        raise DLRError(f"no policy {name!r}; one of {', '.join(p.name for p in self.policies)}")

    def prepare(self, policy: Policy) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
        """The policy's forward pass on weights of its own, and what it trains of them."""
        train = policy.aim == "weights"
        weights = {name: w.detach().requires_grad_(train) for name, w in self.weights.items()}
        if policy.aim != "adapters":
            return partial(policy.run, **weights), list(weights.values()) if train else []
        adapters = [new_adapter(w, self.adapter_rank) for w in weights.values() if w.dim() > 1]
        return partial(policy.run, **weights, adapters=adapters), [t for pair in adapters for t in pair]

    def count_inference(self, name: str) -> Counts:
        """What one inference pass dispatches."""
        with torch.no_grad():
            return count(lambda: self.inference[name](self.x))


def arms(
    spec: DLRSpec, intermediate: int, *, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Arm, Arm]:
    """(locked, original): the chain and a SwiGLU MLP of width `intermediate`, of random weights, on random tokens."""
    slot = Slot(Case(spec, intermediate, tokens), device, dtype, cold_bytes=0)
    chain, mlp = slot.chain[0], slot.dense[0]
    policies = chain_policies(spec)
    runtime = partial(dlr_net, **chain, act=spec.act, gram=slot.gram[0])
    plain = partial(policies[0].run, **chain)
    locked = Arm(slot.x, chain, policies, adapter_rank(spec), {"reference": plain, "runtime": runtime})
    policies = mlp_policies(spec.hidden_size)
    return locked, Arm(slot.x, mlp, policies, ADAPTER_RANK, {"reference": partial(policies[0].run, **mlp)})


def counted_arms(
    spec: DLRSpec, intermediate: int, *, tokens: int, dtype: torch.dtype
) -> tuple[list[Row], list[Row]]:
    """(locked, original): every policy but the compiled ones counted, on tensors without data: any size, no time."""
    with FakeTensorMode():
        locked, original = arms(spec, intermediate, tokens=tokens, dtype=dtype, device=torch.device("cpu"))
        return rows(locked), rows(original)


def rows(arm: Arm, policies: Iterable[Policy] | None = None, *, repeats: int = 0) -> list[Row]:
    """A row for each policy, by default all that can be counted; timed where repeats > 0."""
    chosen: Sequence[Policy] = (
        [p for p in arm.policies if not p.compiled] if policies is None else list(policies)
    )
    return [measure(arm, policy, repeats=repeats) for policy in chosen]


def measure(arm: Arm, policy: Policy, *, repeats: int = 0) -> Row:
    """The policy's row. A compiled step is not counted, but for what autograd saves of it."""
    function, trained = arm.prepare(policy)
    x = arm.x.detach().requires_grad_()

    def step() -> int:
        with recorded(trained) as saved:
            y = function(x)
        kept = sum(saved.values())
        torch.autograd.grad(y, [x, *trained], torch.ones_like(y), allow_unused=True)
        return kept

    counts = seconds = peak = None
    try:
        with compiler_errors():
            if policy.compiled:
                saved = step()
            else:
                counts = count_step(function, x, trained)
                saved = counts.saved
            if repeats:
                seconds = time_step(function, x, trained, repeats=repeats)
                peak = device_peak(step, x.device)
    except DLRError as error:
        return Row(policy.name, policy.aim, error=str(error))
    return Row(policy.name, policy.aim, saved, counts, seconds, peak)
