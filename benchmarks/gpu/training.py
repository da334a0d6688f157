"""Stage `training`: what a training step of a whole model takes against an inference pass, by every policy.

The lock's promise is that the first grows and the second does not. The best policy of either side counts, for an
attacker takes the best.
"""

import gc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dlr_lock.audit.meters import device_peak, median_seconds, time_step
from dlr_lock.audit.systems.model import ModelPolicy, model_policies, prepared
from dlr_lock.runtime import DLRSpec
from dlr_lock.runtime.dtypes import dtype_name
from dlr_lock.triton_kernels import backend

from . import build
from .build import ModelShape
from .models import noting
from .rows import TrainingRow
from .stage import Record

SEQUENCES, LENGTH = 4, 1024
_SAME_LOSS = 0.01  # relative: policies differ in the order of sums alone


@dataclass(frozen=True, slots=True)
class Job:
    """A policy of one side of a model; None is inference."""

    shape: ModelShape
    spec: DLRSpec
    side: str
    policy: ModelPolicy | None

    def key(self) -> dict[str, Any]:
        """The fields of a row that tell the job."""
        lanes, depth, rank, _ = self.spec.weight_shape
        name = "inference" if self.policy is None else self.policy.name
        return {
            "model": self.shape.name, "lanes": lanes, "depth": depth, "rank": rank, "side": self.side, "policy": name
        }  # fmt: skip


def measure(record: Record) -> None:
    """A row for inference and for every policy of both sides that trains all weights."""
    gpu = record.device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    size = (1, 16) if record.smoke else (SEQUENCES, LENGTH)
    shape: ModelShape | None = None
    sides: dict[str, PreTrainedModel] = {}
    for job in record.unmeasured(jobs(smoke=record.smoke), Job.key):
        if job.shape != shape:
            shape, sides = job.shape, {}
            gc.collect()
            ids = torch.randint(job.shape.vocabulary, size, generator=torch.Generator().manual_seed(3))
        row = TrainingRow(**job.key(), tokens=ids.numel(), dtype=dtype_name(dtype))
        with noting(row):
            if not sides:
                original = build.original(job.shape, dtype, record.device)
                sides = {"original": original, "locked": build.locked(original, job.shape, job.spec)}
            _time(row, job, sides[job.side], ids.to(record.device), repeats=1 if record.smoke else 3)
        if job.policy is not None and row.loss is not None:
            plain = next((r["loss"] for r in record.rows if _is_plain(r, row)), row.loss)
            row.accurate = plain is not None and abs(row.loss - plain) <= _SAME_LOSS * abs(plain)
            if not row.accurate:
                row.error_message = f"the loss is {row.loss:.4f}, of the plain policy {plain}"
                row.forward_s = row.backward_s = row.update_s = row.step_s = None
        record.add(row)
        if gpu:
            torch.cuda.empty_cache()


def jobs(*, smoke: bool) -> list[Job]:
    """A model after the other, the small one first; of each the chain that a conversion makes."""
    listed = []
    for shape in build.TINY if smoke else build.SHAPES:
        for side in ("original", "locked"):
            own = [p for p in model_policies(locked=side == "locked") if p.aim == "weights"]
            listed += [Job(shape, shape.specs()[0], side, p) for p in (None, *(own[:2] if smoke else own))]
    return listed


def _time(row: TrainingRow, job: Job, model: PreTrainedModel, ids: Tensor, repeats: int) -> None:
    device = model.device
    if job.policy is None:

        def infer() -> object:
            return model(input_ids=ids, use_cache=False, logits_to_keep=1)

        with backend("triton" if device.type == "cuda" else "auto"), torch.no_grad():
            row.step_s = row.forward_s = median_seconds(infer, device, repeats)
            row.peak_bytes = device_peak(infer, device)
        row.accurate = True
        return
    losses = []
    with backend("naive"), prepared(model, job.shape.mlps, job.policy) as trained:

        def loss(tokens: Tensor) -> Tensor:
            value = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            losses.append(value.detach())
            return value

        seconds = time_step(loss, ids, trained, repeats=repeats)
        row.peak_bytes = device_peak(
            lambda: torch.autograd.grad(loss(ids), trained, allow_unused=True), device
        )
    row.loss = losses[-1].item()
    row.forward_s, row.backward_s, row.update_s = seconds.forward, seconds.backward, seconds.update
    row.step_s = seconds.step


def _is_plain(row: dict[str, Any], of: TrainingRow) -> bool:
    same = all(row[name] == getattr(of, name) for name in ("model", "lanes", "depth", "rank", "side"))
    return same and row["policy"] == "plain"
