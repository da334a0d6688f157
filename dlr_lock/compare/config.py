"""Every choice of `bench model`. Torch is imported where it is needed, for a page of help needs none of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..common.errors import DLRError
from ..common.options import check_names, flag, known_name, option

ENGINES = ("transformers", "vllm")
_MOST = 2**20  # sequences, tokens or repeats
_LEAST = {"prompt": 1, "new_tokens": 2, "repeats": 1}
_ON_A_GPU = {"prompt": 512, "new_tokens": 128, "batches": "1,8,64", "repeats": 10}
_ON_A_CPU = {"prompt": 64, "new_tokens": 16, "batches": "1,8", "repeats": 3}


def _by_device(name: str) -> str:
    return f"{_ON_A_GPU[name]} on a GPU, {_ON_A_CPU[name]} on a CPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedConfig:
    """The choices of `bench_model`; every field says in its help what it is."""

    engine: str = option("transformers", "transformers or vllm: what runs both models.")
    prompt: int | None = option(None, "Tokens of a prompt.", _by_device("prompt"))
    new_tokens: int | None = option(
        None, "Tokens to generate for each sequence, 2 or more.", _by_device("new_tokens")
    )
    batches: str | None = option(None, "Sequences at a time, such as 1,8,64.", _by_device("batches"))
    repeats: int | None = option(None, "Runs of each model at each batch.", _by_device("repeats"))
    dtype: str | None = option(
        None, "float32, bfloat16 or float16.", "the checkpoint's on a GPU, float32 on a CPU"
    )
    eager: bool = option(False, "Compile nothing and capture no CUDA graphs, whatever the engine does else.")
    device: str | None = option(None, "cpu, cuda, cuda:1, ...", "the best there is")

    @classmethod
    def of(cls, choices: dict[str, Any]) -> SpeedConfig:
        """The choices by name. Raises DLRError on a name that there is not."""
        check_names(choices, cls)
        return cls(**choices)

    def resolved(self) -> SpeedConfig:
        """The same with every None filled in but the dtype's. Raises DLRError on bad values, before any work."""
        from ..common.dtypes import DTYPES
        from ..microbench.bench import numbers
        from ..runtime.device import usable_device

        engine = known_name(self.engine, ENGINES, "engine")
        if engine == "vllm" and self.device is not None:
            raise DLRError("vLLM takes the device that it is built for: leave --device out")
        device = usable_device(self.device)
        usual = _ON_A_GPU if device.type == "cuda" else _ON_A_CPU
        chosen: dict[str, Any] = {
            name: usual[name] if (value := getattr(self, name)) is None else value for name in usual
        }
        for name, least in _LEAST.items():
            if not least <= chosen[name] <= _MOST:
                raise DLRError(f"{flag(name)} must be from {least} to {_MOST}, not {chosen[name]}")
        if not all(1 <= batch <= _MOST for batch in numbers(chosen["batches"])):
            raise DLRError(f"--batches must be numbers from 1 to {_MOST}")
        dtype = None if self.dtype is None else known_name(self.dtype, DTYPES, "dtype")
        return replace(self, engine=engine, device=str(device), dtype=dtype, **chosen)

    @property
    def sizes(self) -> list[int]:
        """The batches, each once."""
        from ..microbench.bench import numbers

        return list(dict.fromkeys(numbers(self.batches or "")))
