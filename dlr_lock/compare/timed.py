"""A model that is timed: one contract, and transformers' own `generate` behind it. vLLM's is in `vllm_model.py`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..common.dtypes import DTYPES, dtype_name
from ..common.errors import DLRError
from ..common.hooks import frozen
from ..common.memory import watch_memory
from ..convert.use import opened
from ..runtime.generation import positions
from .config import SpeedConfig


class TimedModel(Protocol):
    """A loaded model, and how to run it.

    Attributes:
        dtype: Of its weights, by name.
        threads: That it computes with on a CPU.
        versions: Of what runs it, beside the packages that every result names.
        weights_bytes: Of its parameters, None where the engine stores them in forms of its own.
    """

    dtype: str
    threads: int
    versions: dict[str, str]
    weights_bytes: int | None

    def run(self, batch: int, prompt: int, new_tokens: int) -> dict[str, Any]:
        """Generates `new_tokens` for each of `batch` random prompts of `prompt` tokens.

        Returns:
            first_token_s: Seconds until the first token of every sequence is there.
            decode_s: Seconds that the others took.
            peak_bytes: Memory at its most, see `SpeedRow`; None where nobody counts it.

        Raises:
            RuntimeError, MemoryError: This run is not possible; others may be.
            DLRError: No more runs are.
        """
        ...


class TransformersModel:
    """A `TimedModel` of transformers, in this process.

    A run is one call of `generate`. Its clock is a streamer, which is handed every token as it is there: the first one
    ends the prefill, the others are decoded. On a GPU the cache is static, which `generate` then compiles for.
    """

    def __init__(self, model: PreTrainedModel, *, eager: bool) -> None:
        self._model = model
        self._static = model.device.type == "cuda" and not eager
        self.dtype = dtype_name(model.dtype)
        self.threads = torch.get_num_threads()
        self.versions: dict[str, str] = {}
        self._weights = sum(parameter.nbytes for parameter in model.parameters())
        self.weights_bytes: int | None = self._weights

    def run(self, batch: int, prompt: int, new_tokens: int) -> dict[str, Any]:
        model = self._model
        source = torch.Generator().manual_seed(batch)
        ids = torch.randint(model.config.get_text_config().vocab_size, (batch, prompt), generator=source)
        ids = ids.to(model.device)
        clock = Clock()
        peak = watch_memory(model.device.type)
        with frozen(model):
            began = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
                cache_implementation="static" if self._static else None,
            )
        _, first, *_, last = clock.times
        if len(clock.times) != new_tokens + 1:
            raise RuntimeError(f"{len(clock.times) - 1} tokens came instead of {new_tokens}")
        counted = peak()
        grown = None if counted is None else self._weights + counted[1] - counted[0]
        return {"first_token_s": first - began, "decode_s": last - first, "peak_bytes": grown}


class Clock(BaseStreamer):
    """When the prompt and every token were handed over, in seconds; the GPU has then computed them."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


@contextmanager
def opened_in_transformers(side: str, source: str | Path, config: SpeedConfig) -> Iterator[TransformersModel]:
    """A model by its name (see `convert.use.opened`), while open.

    Raises:
        DLRError: It cannot be loaded, cannot generate, or does not take sequences so long.
    """
    dtype = None if config.dtype is None else DTYPES[config.dtype]
    with opened(source, device=config.device, dtype=dtype) as (model, _):
        if not model.can_generate():
            raise DLRError(f"the {side} model, a {type(model).__name__}, cannot generate text")
        check_length(side, model.config, config)
        yield TransformersModel(model, eager=config.eager)


def check_length(side: str, model_config: Any, config: SpeedConfig) -> None:
    """Raises DLRError where a model of this config takes no sequences of prompt and new tokens."""
    assert config.prompt is not None and config.new_tokens is not None
    limit, length = positions(model_config), config.prompt + config.new_tokens
    if limit is not None and length > limit:
        raise DLRError(
            f"prompt and new tokens make {length} tokens, the {side} model takes {limit}: ask for fewer"
        )
