"""Stage `models`: decode and prefill of whole models, locked against original, on the same engine in turns."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dlr_lock.common.dtypes import dtype_name
from dlr_lock.microbench.timing import Runner, set_times, take_turns
from dlr_lock.runtime import DLRSpec
from dlr_lock.triton_kernels import backend

from . import build
from .build import ModelShape
from .rows import ModelRow
from .stage import Record, capture_error
from .step import KEPT, decode_step, errors, prefill_step

ROUNDS = 10
CONTEXT = 256  # tokens in the cache while decoding


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured of a model at once: both sides, by every engine."""

    shape: ModelShape
    spec: DLRSpec
    phase: str
    batch: int
    tokens: int
    context: int

    def key(self) -> dict[str, Any]:
        """The fields of a row that tell the job."""
        lanes, depth, rank, hidden = self.spec.weight_shape
        return {
            "model": self.shape.name, "hidden": hidden, "intermediate": self.shape.intermediate,
            "layers": self.shape.layers, "lanes": lanes, "depth": depth, "rank": rank, "phase": self.phase,
            "batch": self.batch, "tokens": self.tokens, "context": self.context,
        }  # fmt: skip


def measure(record: Record) -> None:
    """Rows of every model, chain, phase, engine and side."""
    gpu = record.device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    sides: dict[tuple[str, str], PreTrainedModel] = {}

    def failed(job: Job, why: str | None = None) -> ModelRow:
        return ModelRow(
            **job.key(), dtype=dtype_name(dtype), side="locked", engine="eager", error_message=why
        )

    for job in record.unmeasured(jobs(smoke=record.smoke), Job.key, failed):
        wanted = {(job.shape.name, ""), (job.shape.name, str(job.spec))}
        for old in set(sides) - wanted:
            del sides[old]
        _free(gpu)
        row = failed(job)
        with capture_error(row):  # such as a model that does not fit
            for name, spec in sorted(wanted):
                if (name, spec) not in sides:
                    model = sides.get((name, ""))
                    sides[name, spec] = (
                        build.original(job.shape, dtype, record.device)
                        if model is None
                        else build.locked(model, job.shape, job.spec)
                    )
                    record.alive("when the models were built")
            ours, theirs = sides[job.shape.name, str(job.spec)], sides[job.shape.name, ""]
            record.add(*compared(job, ours, theirs, rounds=2 if record.smoke else ROUNDS))
        if row.error_message is not None:
            record.add(row)


def jobs(*, smoke: bool) -> list[Job]:
    """In the order of their worth: decoding by the first chain of every model stands first."""
    steps = [
        ("decode", 1, 1, CONTEXT),
        ("prefill", 1, 512, 0),
        ("decode", 16, 16, CONTEXT),
        ("prefill", 1, 4096, 0),
    ]
    if smoke:
        steps = [("decode", 1, 1, 8), ("prefill", 1, 80, 0)]
    shapes = build.TINY if smoke else build.SHAPES
    most = max(len(shape.chains) for shape in shapes)
    return [
        Job(shape, shape.specs()[chain], *step)
        for chain in range(most)
        for shape in shapes
        if chain < len(shape.chains)
        for step in steps
    ]


@torch.no_grad()
def compared(job: Job, ours: PreTrainedModel, theirs: PreTrainedModel, rounds: int) -> list[ModelRow]:
    """The rows of a job; of a locked model's step whose logits are not those of its chains, the error and no time."""
    gpu = ours.device.type == "cuda"
    rows: list[ModelRow] = []
    runners: list[Runner | None] = []
    steps = []
    with backend(
        "triton" if gpu else "auto"
    ):  # on a GPU the kernels or an error, never plain torch unnoticed
        for side, model in (("original", theirs), ("locked", ours)):
            for engine in ("eager", "graph") if gpu else ("eager",):
                row = ModelRow(**job.key(), dtype=dtype_name(model.dtype), side=side, engine=engine)
                runner = step = None
                with capture_error(row):
                    step = step_of(job, model)
                    runner = Runner(lambda _, step=step: step(), 1, model.device, graph=engine == "graph")
                rows.append(row)
                runners.append(runner)
                steps.append(step)
        times = take_turns(rows, runners, rounds, capture_error)
        for row, runner, step, seconds in zip(rows, runners, steps, times, strict=True):
            if runner is not None and row.error_message is None:
                with capture_error(row):
                    _judge(row, job, theirs if row.side == "original" else ours, runner, step)
                    if row.accurate:
                        row.launches = runner.launches()
                        _fill(row, build.read_bytes(theirs if row.side == "original" else ours), seconds)
    for row in rows:
        base = next((r for r in rows if (r.side, r.engine) == ("original", row.engine)), None)
        if base and base.median_us and row.median_us:
            row.ratio_to_original = row.median_us / base.median_us
    return rows


def step_of(job: Job, model: PreTrainedModel) -> Callable[..., Tensor]:
    """The step that a job times."""
    if job.phase == "decode":
        return decode_step(model, job.batch, job.context)
    return prefill_step(model, job.tokens)


def _judge(
    row: ModelRow, job: Job, model: PreTrainedModel, runner: Runner, step: Callable[..., Tensor]
) -> None:
    """What was timed (of a graph: what its last replay wrote) is finite and, of a locked model, what the chains say."""
    output = runner.output().clone()
    row.accurate = bool(output.isfinite().all())
    if not row.accurate:
        row.error_message = "the logits are not finite"
    elif row.side == "locked":
        judged: Callable[[], Tensor] = step
        if job.phase == "prefill" and row.engine == "eager":  # more positions than what is timed works out
            judged = lambda: step(min(KEPT, job.tokens))  # noqa: E731
            output = judged()
        row.error, row.naive_error, row.error_limit = errors(model, judged, output)
        row.accurate = row.error <= row.error_limit


def _fill(row: ModelRow, size: int, seconds: list[float]) -> None:
    middle = set_times(row, seconds)
    row.tokens_per_s, row.gb_per_s = row.tokens / middle, size / middle / 1e9


def _free(gpu: bool) -> None:
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()


def of_row(row: dict[str, Any], *, smoke: bool) -> Job:
    """The job that a row is of."""
    listed = jobs(smoke=smoke)
    return next(job for job in listed if all(row[name] == value for name, value in job.key().items()))
