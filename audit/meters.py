"""What a training step costs, counted: FLOPs, launches and how many wait for each other, bytes kept and at the peak.

Counts are exact and the same on every device; they hold on fake and meta tensors too, so that models which fit no
machine at hand can be counted. Seconds are the exception, and stand apart.
"""

import copy
import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ..common.timing import now
from ..triton_kernels import backend
from ..triton_kernels.lookahead import SOLVED, gram_steps

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Counts:
    """What some work dispatched.

    Attributes:
        flops: Of products and attention, a multiply-add being two.
        launches: Operations that compute, each at least one kernel in eager mode; views and empty tensors are none.
        dependent: The longest run of launches of which each reads what the one before wrote.
    """

    flops: int = 0
    launches: int = 0
    dependent: int = 0


@dataclass(frozen=True, slots=True)
class StepCounts:
    """One training step without the optimizer's update, which is the same for all who train the same.

    Attributes:
        forward, backward: What the passes dispatch.
        saved: Bytes that autograd saves for the backward pass, parameters left out, each storage once, as
            saved_tensors_hooks show it.
        held: Bytes alive between forward and backward, the output left out; also what a selective checkpoint caches,
            which autograd's hooks do not see.
        peak: The most bytes alive at any time, gradients included, parameters left out; an operation's own scratch is
            the device's business, see `device_peak`.
    """

    forward: Counts
    backward: Counts
    saved: int
    held: int
    peak: int

    @property
    def flops(self) -> int:
        """FLOPs of both passes."""
        return self.forward.flops + self.backward.flops

    @property
    def dependent(self) -> int:
        """Dependent launches of both passes."""
        return self.forward.dependent + self.backward.dependent


class Meter(TorchDispatchMode):
    """Counts all that torch dispatches while it is on, autograd's backward and recomputations included.

        meter = Meter()
        with meter:
            y = forward()
        counts = meter.take()

    Tensors that were there before are free; `adopt` counts one as if it had been made within. Of what is compiled
    it sees nothing (torch.compile refuses to run), of a custom autograd Function all, of the fused DLR-Net op its
    FLOPs and its prefill's launches: three a block, two where that is a step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0  # bytes
        self._flops = self._launches = self._longest = 0
        self._sizes: dict[int, int] = {}  # of storages alive, by address: bytes if made within, else 0
        self._watches: dict[int, weakref.ref] = {}
        self._depth: dict[
            int, int
        ] = {}  # launches that a storage's content waited for, since the last `take`

    def take(self) -> Counts:
        """What was counted since the last `take`; bytes go on."""
        counts = Counts(self._flops, self._launches, self._longest)
        self._flops = self._launches = self._longest = 0
        self._depth = {}
        return counts

    def adopt(self, tensor: Tensor) -> None:
        """Counts the tensor's storage as made within."""
        self._watch(tensor.untyped_storage(), made_within=True)

    def bytes_of(self, tensor: Tensor) -> int:
        """What the tensor's storage adds to `live`."""
        return self.bytes_at(tensor.untyped_storage()._cdata)

    def bytes_at(self, storage: int) -> int:
        """The same for a storage's address."""
        return self._sizes.get(storage, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        reads = _storages(args, kwargs)
        for storage in reads:
            self._watch(storage, made_within=False)
        result = func(*args, **kwargs)
        writes = _storages(result)
        for storage in writes:
            self._watch(storage, made_within=True)
        if writes and not func.is_view and func.overloadpacket not in _NO_LAUNCH:
            launches = _dlr_net_launches(*args) if func.overloadpacket is _DLR_NET else 1
            self._launches += launches
            depth = launches + max((self._depth.get(s._cdata, 0) for s in reads), default=0)
            self._longest = max(self._longest, depth)
            for storage in writes:
                self._depth[storage._cdata] = depth
        if (formula := _FLOPS.get(func.overloadpacket)) is not None:
            self._flops += formula(*args, **kwargs, out_val=result)
        return result

    def _watch(self, storage: torch.UntypedStorage, *, made_within: bool) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size = storage.nbytes() if made_within else 0
        # torch keeps one Python object for a storage as long as the storage lives, so this tells its end.
        self._watches[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        del self._watches[key]
        self._depth.pop(key, None)


def count_step(function: Callable[[Tensor], Tensor], x: Tensor, trained: Sequence[Tensor]) -> StepCounts:
    """Counts the training step of y = function(x). Nothing is changed: gradients are thrown away.

    Args:
        function: The forward pass. y's gradient is all ones.
        x: Its input, of any dtype. Where it requires a gradient, its gradient is computed too, and it counts as an
            activation of the layer before, that is, where the function keeps it.
        trained: The tensors whose gradients are computed.
    """
    meter = Meter()
    entering = x.clone() if x.requires_grad else x  # not a leaf: autograd would keep that in any case
    if x.requires_grad:
        meter.adopt(entering)
    wanted = [x, *trained] if x.requires_grad else list(trained)
    with recorded(()) as saved, meter:
        y = function(entering)
    del entering
    forward, held = meter.take(), meter.live - meter.bytes_of(y)
    kept = sum(
        meter.bytes_at(storage) for storage in saved
    )  # what was there before, such as weights, adds nothing
    with meter:
        torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)
        backward = meter.take()
    return StepCounts(forward, backward, kept, held, meter.peak)


def count(function: Callable[[], Any]) -> Counts:
    """What one call dispatches."""
    meter = Meter()
    with meter:
        function()
    return meter.take()


@contextmanager
def recorded(own: Sequence[Tensor]) -> Iterator[dict[int, int]]:
    """What autograd saves within the block, by torch.autograd.graph.saved_tensors_hooks.

    Args:
        own: Tensors whose storages are left out.

    Yields:
        Bytes by the storage's address. Addresses are used twice once the graph is gone, so read it while the output
        lives.
    """
    ours = {t.untyped_storage()._cdata for t in own}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in ours:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def saved_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd saves during a forward pass; a storage that several nodes share counts once.

    DLR-Nets run as the plain chain, since their op has no backward.

    Args:
        module: Its parameters and buffers are left out.
        forward: The pass.
    """
    with recorded([*module.parameters(), *module.buffers()]) as saved, backend("naive"):
        result = forward()
    total = sum(saved.values())
    del result
    return total


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Seconds of a training step, medians: its forward and backward pass, and an update by SGD."""

    forward: float
    backward: float
    update: float

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return self.forward + self.backward + self.update


def time_step(
    function: Callable[[Tensor], Tensor], x: Tensor, trained: Sequence[Tensor], *, repeats: int = 3
) -> StepSeconds:
    """Times the step that `count_step` counts, and the update.

    The rate is 0: nothing is changed, but gradients (`.grad`) are freed.

    Args:
        function, x, trained: As for `count_step`.
        repeats: How many steps the medians are of, after a warm-up.
    """
    rounds = []
    for _ in range(repeats + 1):
        laps = [now(x.device)]
        y = function(x)
        laps.append(now(x.device))
        y.backward(torch.ones_like(y))
        laps.append(now(x.device))
        with torch.no_grad():
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=0.0)
        laps.append(now(x.device))
        rounds.append([end - start for start, end in pairwise(laps)])
        del y
        for leaf in (x, *trained):
            leaf.grad = None
    return StepSeconds(*map(statistics.median, zip(*rounds[1:], strict=True)))


def without_data(model: nn.Module) -> tuple[FakeTensorMode, Any]:
    """A copy of a model whose tensors have shapes alone, and the mode to run it in: what runs there can be counted.

    Experts of a mixture run in batched products there: torch knows the shapes of grouped ones for bfloat16 alone.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # tensors that are no parameters or buffers
    memo: dict[int, object] = {
        id(p): nn.Parameter(mode.from_tensor(p.detach()), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    memo |= {id(b): mode.from_tensor(b) for b in model.buffers()}
    ghost = copy.deepcopy(model, memo)
    if getattr(getattr(ghost, "config", None), "_experts_implementation", None) == "grouped_mm":
        ghost.set_experts_implementation("batched_mm")  # type: ignore[operator]
    return mode, ghost


def device_peak(work: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes that torch allocates on a GPU during `work()`, beyond what it had; None on other devices."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _storages(*values: Any) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, Tensor)]


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, out_val: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _dlr_net_flops(
    x: Tensor, A: Tensor, B: Tensor, scale: Tensor, bias: Tensor, G: Tensor | None, act: str,
    gram: Tensor | None, backend: str, *, out_val: Any,
) -> int:  # fmt: skip
    """Look-ahead's: the products with the weights, and within a block of S steps those of a step with the earlier
    ones, S (S - 1) / 2 of [T, r] x [r, r]. A gated chain has no blocks, and three products a step."""
    tokens, rank = x.numel() // x.shape[-1], A.shape[2]
    earlier = sum(S * (S - 1) // 2 for S in _block_steps(A, gram))
    return 2 * tokens * ((2 if G is None else 3) * A.numel() + len(A) * earlier * rank**2)


def _dlr_net_launches(
    x: Tensor, A: Tensor, B: Tensor, scale: Tensor, bias: Tensor, G: Tensor | None, act: str,
    gram: Tensor | None, backend: str,
) -> int:  # fmt: skip
    if G is not None:
        return 5 * A.shape[1]  # step by step: three products, the activation, the gate
    wide = A.shape[2] > SOLVED  # else several steps are one solve
    return sum(1 + S if wide or S == 1 else 3 for S in _block_steps(A, gram))


def _block_steps(A: Tensor, gram: Tensor | None) -> list[int]:
    """Steps of each block."""
    steps, depth = 1 if gram is None else gram_steps(gram), A.shape[1]
    return [min(steps, depth - first) for first in range(0, depth, steps)]


_DLR_NET = torch.ops.dlr_lock.dlr_net
# torch.utils.flop_counter knows neither products written in place, nor a CPU's attention, nor our op.
_FLOPS: dict[Any, Callable[..., int]] = flop_registry | {
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    _DLR_NET: _dlr_net_flops,
}
_NO_LAUNCH = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view,
    aten.lift_fresh,
}  # fmt: skip
