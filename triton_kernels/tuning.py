"""Refines the cost model's choice by measurement, where the user asks for it with DLR_LOCK_TUNE=1.

The first call of a shape, in the warm-up, then times a few decode plans and prefill on the call's own tensors. What
won is kept in the user's cache, for this device and these versions, and used from then on, asked for or not.
"""

import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import torch
import triton

from ..common.cache import read_table, write_table
from .cost import choose, decode_plan
from .decode_plan import MAX_STEPS, DecodePlan
from .gpu import Device
from .rounds import Shape

VARIABLE = "DLR_LOCK_TUNE"
_FORMAT = 3
_TABLE = "tuning.json"  # in the user's cache
_ROUNDS = 7  # samples a candidate, of which the median counts
# Written between two samples: weights do not stay in L2 from one layer's turn to the next.
_FLUSH_BYTES = 256 * 2**20
_PREFILL = "prefill"


def wanted() -> bool:
    """Whether the user asked for measurements."""
    return os.environ.get(VARIABLE, "").lower() in ("1", "true", "yes", "on")


def tuned(shape: Shape, device: Device, steps: int, deterministic: bool) -> tuple[DecodePlan | None] | None:
    """What was measured to be fastest for a chain, with the arguments of `cost.decode_plan`.

    Returns:
        The plan of decode, or None for prefill, in a tuple of one; None where nothing was measured.
    """
    entry = _table().get(_key(shape, device, steps, deterministic))
    if entry is None:
        return None
    plan = None if entry == _PREFILL else decode_plan(_rounded(shape), device, steps, deterministic)
    try:
        found = None if plan is None else replace(plan, **entry)
    except (TypeError, ValueError):
        return None
    # a table of other hands may hold anything
    return (found,) if found in candidates(_rounded(shape), device, steps, deterministic) else None


def candidates(shape: Shape, device: Device, steps: int, deterministic: bool) -> list[DecodePlan | None]:
    """What is worth a measurement for a chain, with the arguments of `cost.decode_plan`.

    Returns:
        The cost model's choice first, then prefill, which is None, and neighbours of decode's plan.
    """
    first = choose(shape, device, steps, deterministic)
    plan = decode_plan(shape, device, steps, deterministic)
    if plan is None:
        return [None]
    most = min(steps, shape.depth, 2 * MAX_STEPS)
    fitting = sorted({plan.steps, *(s for s in range(1, most + 1) if steps % s == 0)})
    at = fitting.index(plan.steps)
    near = fitting[max(0, at - 1) : at + 2]
    variants = [replace(plan, steps=s, num_warps=w) for s in near for w in (plan.num_warps, 4)]
    return list(dict.fromkeys([first, None, plan, *variants]))


def tune(
    shape: Shape,
    device: Device,
    steps: int,
    deterministic: bool,
    run: Callable[[DecodePlan | None], object],
    seconds: Callable[[Callable[[], object]], float] | None = None,
) -> DecodePlan | None:
    """Times every candidate, and keeps the fastest for this process and later ones.

    Args:
        shape, device, steps, deterministic: As `cost.decode_plan` takes them.
        run: Runs the chain by a plan of decode, or by prefill for None. A candidate with which it fails is passed over.
        seconds: How to time a call of no arguments; on the GPU, with cold caches, if None.

    Returns:
        The fastest candidate.

    Raises:
        Exception: The last candidate's, where all of them failed.
    """
    measure = seconds or _gpu_seconds
    times: dict[DecodePlan | None, float] = {}
    for plan in candidates(shape, device, steps, deterministic):
        try:
            times[plan] = measure(lambda plan=plan: run(plan))  # type: ignore[misc]
        except Exception as error:
            failure = error  # too many registers, shared memory or programs for this device
    if not times:
        raise failure
    best = min(times, key=lambda plan: times[plan])
    entry = _PREFILL if best is None else {"steps": best.steps, "num_warps": best.num_warps}
    _table()[_key(shape, device, steps, deterministic)] = entry
    write_table(_TABLE, _versions(), _table())
    return best


def _gpu_seconds(call: Callable[[], object]) -> float:
    call()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    samples = []
    for _ in range(_ROUNDS):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(samples)


def _rounded(shape: Shape) -> Shape:
    """Numbers of tokens that share an entry: up to the next power of two."""
    return replace(shape, tokens=triton.next_power_of_2(shape.tokens))


def _key(shape: Shape, device: Device, steps: int, deterministic: bool) -> str:
    numbers = " ".join(f"{name}={int(value)}" for name, value in asdict(_rounded(shape)).items())
    return f"{device.name}; {numbers} block={steps} deterministic={int(deterministic)}"


@cache
def _table() -> dict[str, Any]:
    """The entries that are known in this process."""
    return read_table(_TABLE, _versions())


def forget() -> None:
    """Reads the table anew at the next call."""
    _table.cache_clear()


def _versions() -> dict[str, Any]:
    return {"format": _FORMAT, "torch": torch.__version__, "triton": triton.__version__}
