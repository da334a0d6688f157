"""What launches get to write to: memory of their own call, so that calls share nothing on streams and in graphs.

Counted without a GPU: launches are recorded, not made.
"""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_chains import drawn
from torch import Tensor

from dlr_lock.triton_kernels import gram_blocks
from dlr_lock.triton_kernels.decode import decode
from dlr_lock.triton_kernels.decode_plan import plan_decode
from dlr_lock.triton_kernels.gpu import H200
from dlr_lock.triton_kernels.launch import Launch
from dlr_lock.triton_kernels.prefill import prefill
from dlr_lock.triton_kernels.rounds import Shape

CHAIN = drawn(1, 4, 192, 576, torch.bfloat16)
X = torch.randn(512, 576).to(torch.bfloat16)


def decoded(tokens: int) -> Tensor:
    plan = plan_decode(Shape.of(CHAIN.A, tokens), H200)
    assert plan is not None
    return decode(X[:tokens], CHAIN, plan)


def prefilled(tokens: int) -> Tensor:
    return prefill(X[:tokens], CHAIN, gram_blocks(CHAIN.A, CHAIN.B, block=2 * 192), H200)


Calls = list[list[Tensor]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The tensors of each launch."""
    found: Calls = []

    def record(self: Launch, grid: object, *arguments: Any) -> None:
        found.append([a for a in arguments if isinstance(a, Tensor)])

    monkeypatch.setattr(Launch, "__call__", record)
    return found


def own(calls: Calls) -> set[int]:
    """Where the storages lie that are neither weights nor x."""
    given = {t.untyped_storage().data_ptr() for t in (X, *CHAIN[:4])}
    return {t.untyped_storage().data_ptr() for tensors in calls for t in tensors} - given


@pytest.mark.parametrize(
    ("call", "tokens", "launches"),
    [(decoded, 1, 1), (decoded, 16, 1), (prefilled, 16, 6), (prefilled, 512, 6)],
)
def test_calls_share_no_memory_and_keep_none(
    call: Callable[[int], Tensor], tokens: int, launches: int, launched: Calls
) -> None:
    first = call(tokens)
    assert len(launched) == launches
    begun, launched[:] = list(launched), []
    second = call(tokens)  # while the first one's tensors live: as on another stream, or in another graph
    assert len(own(begun)) > 1 and not own(begun) & own(launched)
    kept = [weakref.ref(t.untyped_storage()) for tensors in begun for t in tensors if t is not first]
    theirs = [weakref.ref(t.untyped_storage()) for t in (X, *CHAIN[:4])]
    del begun
    launched.clear()
    alive = {ref() for ref in kept if ref() is not None}
    assert second is not first
    assert {s.data_ptr() for s in alive} <= {ref().data_ptr() for ref in theirs if ref() is not None}


def test_a_decode_call_is_one_launch_and_one_zeroing(
    launched: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of a graph."""
    zeroed, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: zeroed.append(0) or zeros(*a, **k))
    decoded(1)
    assert (len(launched), len(zeroed)) == (1, 1)
