"""Stage `profiles`: where the time of the worst row of the kernels and of the models goes, kernel by kernel."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dlr_lock import DLRError
from dlr_lock.microbench.bench import cold_weights
from dlr_lock.microbench.slot import Case, Slot, dtype_of
from dlr_lock.runtime.spec import DLRSpec
from dlr_lock.triton_kernels import backend

from .. import schema
from ..output import files, folder
from . import build, models
from .rows import ProfileRow
from .stage import Record

_LARGEST = 15  # kernels that a profile lists
_STEPS = 10


def measure(record: Record) -> None:
    """Rows of the worst row of the kernels and of that of the models, of as many of the two as were measured."""
    found = list(worst(record))
    if not found:
        raise DLRError("nothing to profile: run the stages kernels and models first")
    for kind, row in record.unmeasured(found, lambda pair: {"of": words(*pair)}, _failed):
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(backend("triton" if record.device.type == "cuda" else "auto"))
            step = _slot(record, row) if kind == "kernels" else _model(record, row)
            record.add(*profiled(step, record.device, words(kind, row), _ratio(row)))


def _failed(pair: tuple[str, dict[str, Any]], why: str) -> ProfileRow:
    return ProfileRow(words(*pair), _ratio(pair[1]), "", 0.0, 0.0, 0.0, error_message=why)


def worst(record: Record) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, row): of each kind's newest file the accurate row of ours that is slowest against the original."""
    for kind in ("kernels", "models"):
        for path in files(folder(record.document["device"], record.out), kind)[:1]:
            gpu = record.device.type == "cuda"
            ours = [row for row in schema.load(path)["rows"] if _is_ours(kind, row, gpu)]
            if ours:
                yield kind, max(ours, key=_ratio)


def profiled(step: Callable[[], object], device: torch.device, of: str, ratio: float) -> list[ProfileRow]:
    """The kernels (on a CPU: operations) that take most of `step`."""
    gpu = device.type == "cuda"
    step()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        for _ in range(_STEPS):
            step()
        if gpu:
            torch.cuda.synchronize(device)
    times = {
        event.key: (event.count, event.self_device_time_total if gpu else event.self_cpu_time_total)
        for event in seen.key_averages()
    }
    total = sum(us for _, us in times.values()) or 1.0
    largest = sorted(times.items(), key=lambda item: -item[1][1])[:_LARGEST]
    return [
        ProfileRow(of, ratio, name[:200], count / _STEPS, max(0.0, us) / _STEPS, 100 * max(0.0, us) / total)
        for name, (count, us) in largest
    ]


def words(kind: str, row: dict[str, Any]) -> str:
    """A row, in words."""
    chain = f"{row['lanes']}x{row['depth']}x{row['rank']}"
    if kind == "kernels":
        return (
            f"MLP {row['hidden']}x{row['intermediate']} as {chain}, {row['tokens']} tokens, {row['provider']}"
        )
    return f"{row['model']} as {chain}, {row['phase']} of {row['tokens']} tokens, {row['engine']}"


def _is_ours(kind: str, row: dict[str, Any], gpu: bool) -> bool:
    if kind == "kernels":
        family, mode = row["provider"].split("-")
        ours = family in ("ours", "lookahead")
    else:
        ours, mode = row["side"] == "locked", row["engine"]
    # A graph hides what launching costs, so on a GPU only graphs are judged.
    return ours and row["accurate"] and _ratio(row) > 0 and (not gpu or mode == "graph")


def _ratio(row: dict[str, Any]) -> float:
    return row.get("ratio_to_dense") or row.get("ratio_to_original") or 0.0


def _slot(record: Record, row: dict[str, Any]) -> Callable[[], object]:
    spec = DLRSpec(row["hidden"], row["lanes"], row["depth"], row["rank"])
    case = Case(spec, row["intermediate"], row["tokens"])
    gpu = record.device.type == "cuda"
    slot = Slot(case, record.device, dtype_of("auto", gpu=gpu), cold_weights(record.device) if gpu else 0)
    call = slot.call(row["provider"].replace("-graph", "-eager"))
    assert call is not None
    run, copies = call
    turn = iter(range(10**9))
    return lambda: run(next(turn) % copies)


def _model(record: Record, row: dict[str, Any]) -> Callable[[], object]:
    job = models.of_row(row, smoke=record.smoke)
    dtype = torch.bfloat16 if record.device.type == "cuda" else torch.float32
    model = build.locked(build.original(job.shape, dtype, record.device), job.shape, job.spec)
    return models.step_of(job, model)
