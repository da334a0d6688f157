"""What some work computes, counted as torch dispatches it: FLOPs, launches and how many wait for each other, bytes.

Counts are exact and the same on every device; they hold on fake and meta tensors too, so that models which fit no
machine at hand can be counted.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from . import op  # noqa: F401 (registers the op that is counted here)
from .lookahead import SOLVED, gram_steps

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


def count(function: Callable[[], Any]) -> Counts:
    """What one call dispatches."""
    meter = Meter()
    with meter:
        function()
    return meter.take()


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
