"""Stage `speed`: whole models as they are used, by `bench model`'s own turns: transformers' generate, and vLLM.

The stage `models` times steps, and holds their logits to those of the chains; here an engine runs as it is.
"""

import gc
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dlr_lock.common.dtypes import dtype_name
from dlr_lock.compare.bench import SpeedRow, opened_pair, timed_in_turns
from dlr_lock.compare.config import SpeedConfig
from dlr_lock.compare.timed import TransformersModel

from . import build
from .build import ModelShape
from .stage import Record, capture_error

REPEATS = 3
_BEATS = 30  # signs of life, 10 s apart, while vLLM loads and compiles: it takes minutes, and is silent
_SMOKE = SpeedConfig(prompt=8, new_tokens=4, batches="1,2", repeats=1)


@dataclass(frozen=True, slots=True)
class Job:
    """A model of the shape and the chain that a conversion makes, by an engine, at every batch."""

    shape: ModelShape
    engine: str

    def key(self) -> dict[str, Any]:
        """The fields of a row that tell the job."""
        return {"model": f"{self.shape.name} {self.shape.specs()[0]}", "engine": self.engine}


def measure(record: Record) -> None:
    """Rows of every engine that is installed, shape, batch and side."""
    dtype = torch.bfloat16 if record.device.type == "cuda" else torch.float32
    chosen = _SMOKE if record.smoke else SpeedConfig(repeats=REPEATS)

    def failed(job: Job, why: str | None = None) -> SpeedRow:
        config = chosen.resolved()
        assert config.prompt is not None and config.new_tokens is not None
        return SpeedRow(
            **job.key(), dtype=dtype_name(dtype), prompt=config.prompt, new_tokens=config.new_tokens,
            batch=config.sizes[0], side="locked", error_message=why,
        )  # fmt: skip

    for job in record.unmeasured(jobs(smoke=record.smoke), Job.key, failed):
        row = _Failure()
        with capture_error(row):  # such as a model that does not fit
            record.add(*rows_of(job, chosen, dtype, record))
        if row.error_message is not None:
            record.add(failed(job, row.error_message))


@dataclass(slots=True)
class _Failure:
    """What `capture_error` writes to: rows of speed have no gate."""

    accurate: bool = True
    error_message: str | None = None


def jobs(*, smoke: bool) -> list[Job]:
    """In the order of their worth."""
    engines = ["transformers"] + ["vllm"] * (find_spec("vllm") is not None and not smoke)
    return [Job(shape, engine) for engine in engines for shape in (build.TINY if smoke else build.SHAPES)]


def rows_of(job: Job, chosen: SpeedConfig, dtype: torch.dtype, record: Record) -> list[SpeedRow]:
    """Times both sides of a job."""
    spec, name = job.shape.specs()[0], job.key()["model"]
    choices = {n: getattr(chosen, n) for n in ("prompt", "new_tokens", "batches", "repeats")}
    if job.engine == "vllm":
        config = SpeedConfig(**choices, engine="vllm", dtype=dtype_name(dtype)).resolved()
        with TemporaryDirectory() as work, ExitStack() as stack:
            folders = build.save_both(job.shape, spec, dtype, record.device, Path(work))
            _free()
            with _signs_of_life(record):
                models = stack.enter_context(opened_pair(*folders, config))
            return timed_in_turns(models, name, config, lambda *_: record.alive())[0]
    config = SpeedConfig(**choices, device=str(record.device)).resolved()
    theirs = build.original(job.shape, dtype, record.device)
    sides = {"locked": build.locked(theirs, job.shape, spec), "original": theirs}
    record.alive("when the models were built")
    timed = {side: TransformersModel(model, eager=False) for side, model in sides.items()}
    rows, _ = timed_in_turns(timed, name, config, lambda *_: record.alive())
    _free()
    return rows


@contextmanager
def _signs_of_life(record: Record) -> Iterator[None]:
    over = threading.Event()

    def beat() -> None:
        for _ in range(_BEATS):
            if over.wait(10):
                return
            record.alive()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
