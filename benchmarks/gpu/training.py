"""Stage `training`: what a training step of a whole model takes against an inference pass, by every strategy.

The lock's promise is that the first grows and the second does not. The best strategy of either side counts, for an
attacker takes the best. All run eagerly, as training code does. Strategies compute the same, so that the loss and the
gradients of the first one that can be run (the plain one, where it fits) are the gate of all others.
"""

import gc
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlr_lock.audit.meters import device_peak, time_step
from dlr_lock.audit.strategies.model import prepared
from dlr_lock.audit.strategies.table import Strategy, model_strategies
from dlr_lock.common.dtypes import dtype_name
from dlr_lock.common.timing import median_seconds
from dlr_lock.runtime import DLRSpec
from dlr_lock.triton_kernels import backend

from . import build
from .build import ModelShape
from .rows import TrainingRow
from .stage import Record, capture_error
from .step import KEPT, errors

SEQUENCES, LENGTH = 4, 1024
_SAME_LOSS = 0.01  # relative: strategies differ in the order of sums alone
_SAME_GRADIENT = 0.05  # |g - g0| / |g0|: as for the loss, after all layers and steps in 16 bits
Gradients = list[Tensor]


@dataclass(frozen=True, slots=True)
class Job:
    """A strategy of one side of a model; None is inference."""

    shape: ModelShape
    spec: DLRSpec
    side: str
    strategy: Strategy | None

    def key(self) -> dict[str, Any]:
        """The fields of a row that tell the job."""
        lanes, depth, rank, _ = self.spec.weight_shape
        name = "inference" if self.strategy is None else self.strategy.name
        return {
            "model": self.shape.name, "lanes": lanes, "depth": depth, "rank": rank, "side": self.side, "strategy": name
        }  # fmt: skip


def measure(record: Record) -> None:
    """A row for inference and for every strategy of both sides that trains all weights."""
    gpu = record.device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    size = (1, 16) if record.smoke else (SEQUENCES, LENGTH)
    shape: ModelShape | None = None
    sides: dict[str, PreTrainedModel] = {}
    gates: dict[str, Gradients] = {}

    def failed(job: Job, why: str | None = None) -> TrainingRow:
        return TrainingRow(**job.key(), tokens=size[0] * size[1], dtype=dtype_name(dtype), error_message=why)

    listed = jobs(smoke=record.smoke)
    for job in record.unmeasured(listed, Job.key, failed):
        if job.shape != shape:
            shape, sides, gates = job.shape, {}, {}
            gc.collect()
            ids = torch.randint(job.shape.vocabulary, size, generator=torch.Generator().manual_seed(3))
        row = failed(job)
        try:
            with capture_error(row):
                if not sides:
                    original = build.original(job.shape, dtype, record.device)
                    sides = {"original": original, "locked": build.locked(original, job.shape, job.spec)}
                    record.alive("when the models were built")
                tokens, repeats = ids.to(record.device), 1 if record.smoke else 3
                if job.strategy is None:
                    _infer(row, sides[job.side], tokens, repeats)
                else:
                    gradients = _train(row, job, sides[job.side], tokens, repeats)
                    first = next((r for r in record.rows if _is_gate(r, row)), None)
                    if first is not None and job.side not in gates:  # an earlier process measured it
                        its = next(
                            j for j in listed if j.key() == job.key() | {"strategy": first["strategy"]}
                        )
                        gates[job.side] = _train(failed(its), its, sides[job.side], tokens, repeats=0)
                    judge(row, gradients, first, gates.get(job.side, gradients))
                    if row.accurate:
                        gates.setdefault(job.side, gradients)
        finally:
            _free(sides)
        record.add(row)


def _free(sides: dict[str, PreTrainedModel]) -> None:
    """Frees what a step has left, also one that did not fit."""
    for model in sides.values():
        model.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # of a device that is lost
            torch.cuda.empty_cache()


def judge(row: TrainingRow, gradients: Gradients, first: dict[str, Any] | None, gate: Gradients) -> None:
    """Opens the row's gate, or takes its times. first: the row of the gate's strategy, None where it is this one's."""
    assert row.loss is not None
    loss, strategy = (row.loss, row.strategy) if first is None else (first["loss"], first["strategy"])
    differ = [
        ((g.float() - g0.float()).norm() / g0.float().norm()).item()
        for g, g0 in zip(gradients, gate, strict=True)
    ]
    # A gradient that is 0 or not finite compares to nothing, and its error is not a number.
    row.gradient_error = max(differ, key=lambda value: math.inf if math.isnan(value) else value)
    row.accurate = abs(row.loss - loss) <= _SAME_LOSS * abs(loss) and row.gradient_error <= _SAME_GRADIENT
    if not row.accurate:
        row.error_message = (
            f"loss {row.loss:.4f} and gradients {row.gradient_error:.1e} away, of {strategy} {loss:.4f}"
        )


def jobs(*, smoke: bool) -> list[Job]:
    """A model after the other, the small one first; of each the chain that a conversion makes."""
    listed = []
    for shape in build.TINY if smoke else build.SHAPES:
        for side in ("original", "locked"):
            own = [p for p in model_strategies(locked=side == "locked") if p.trainable == "weights"]
            listed += [Job(shape, shape.specs()[0], side, p) for p in (None, *(own[:2] if smoke else own))]
    return listed


def _infer(row: TrainingRow, model: PreTrainedModel, ids: Tensor, repeats: int) -> None:
    """Times a pass by the kernels, whose last logits must be those of the chains."""
    device = model.device

    def infer(keep: int = 1) -> Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits

    def logits() -> Tensor:
        return infer(min(KEPT, ids.shape[1]))

    with backend("triton" if device.type == "cuda" else "auto"), torch.no_grad():
        got = logits()
        row.accurate = bool(got.isfinite().all())
        if not row.accurate:
            row.error_message = "the logits are not finite"
        elif row.side == "locked":
            row.error, row.naive_error, row.error_limit = errors(model, logits, got)
            row.accurate = row.error <= row.error_limit
        if row.accurate:
            row.step_s = row.forward_s = median_seconds(infer, device, repeats)
            row.peak_bytes = device_peak(infer, device)


def _train(row: TrainingRow, job: Job, model: PreTrainedModel, ids: Tensor, repeats: int) -> Gradients:
    """Times a step (not with 0 repeats), and returns the gradients that the gate looks at."""
    losses, gradients = [], []
    assert job.strategy is not None
    with backend("naive"), prepared(model, job.shape.mlps, job.strategy) as trained:

        def loss(tokens: Tensor) -> Tensor:
            value = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            losses.append(value.detach())
            return value

        def step() -> None:
            found = torch.autograd.grad(loss(ids), trained, allow_unused=True)
            of = {id(weight): gradient for weight, gradient in zip(trained, found, strict=True)}
            gradients[:] = [of[id(weight)].cpu() for weight in judged(model, job.shape.mlps)]

        if repeats:
            seconds = time_step(loss, ids, trained, repeats=repeats)
            row.forward_s, row.backward_s, row.update_s = seconds.forward, seconds.backward, seconds.update
            row.step_s = seconds.step
            row.peak_bytes = device_peak(step, model.device)
        if not gradients:
            step()
    row.loss = losses[-1].item()
    return gradients


def judged(model: PreTrainedModel, mlps: Sequence[str]) -> list[nn.Parameter]:
    """The first weight of the first and of the last MLP or chain: the gradient of the one has passed all others."""
    return [next(model.get_submodule(name).parameters()) for name in (mlps[0], mlps[-1])]


def _is_gate(row: dict[str, Any], of: TrainingRow) -> bool:
    same = all(row[name] == getattr(of, name) for name in ("model", "lanes", "depth", "rank", "side"))
    return same and row["strategy"] != "inference" and row["accurate"]
