"""A model in vLLM, timed: an engine in a process of its own (`vllm_worker.py`), and this process's end of the pipes.

Two engines do not fit into one process, and alone in one an engine's memory can be told. Both live through a whole
run, so that both models can be asked in turn: what drifts falls on both alike.
"""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoConfig, PretrainedConfig

from ..common.dtypes import DTYPES, dtype_name
from ..common.errors import DLRError, first_line
from ..common.files import check_readable
from ..common.hub import model_folder
from ..convert.source import compute_dtype
from ..runtime.serving import engine_environment
from .config import SpeedConfig
from .timed import check_length

_SHARE = 0.3  # of a GPU's memory, which must be free: vLLM's own 0.92 is not where the other model is
_BLOCK = 128  # tokens of a block of the cache, at most
_PATIENCE = 10  # seconds for a process to end by itself


class VLLMModel:
    """A `TimedModel` of vLLM. A run is two requests, for one new token and for all: decoding is what lies between.

    Prefixes are not cached, so every run begins from nothing. The cache is as large as the largest batch wants.

    Args:
        side: Which model it is, for messages.
        folder: Its directory.
        config: Choices, resolved.

    Raises:
        DLRError: The engine does not start; in a line, of its own words.
    """

    def __init__(self, side: str, folder: Path, config: SpeedConfig) -> None:
        assert config.prompt is not None and config.new_tokens is not None
        shape = AutoConfig.from_pretrained(folder)
        check_length(side, shape, config)
        device = torch.device(str(config.device))
        dtype = DTYPES[config.dtype] if config.dtype else compute_dtype(device)
        if not isinstance(dtype, torch.dtype):  # "auto": the checkpoint's own
            dtype = shape.dtype or torch.float32
        length, most = config.prompt + config.new_tokens, max(config.sizes)
        self._side = side
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (see close)
        # One process with all of an engine in it: else its memory would be a child's.
        environment = {**engine_environment("vllm"), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.vllm_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment,
        )  # fmt: skip
        try:
            facts = self._ask(
                model=str(folder), dtype=dtype_name(dtype), max_model_len=length, max_num_seqs=most,
                kv_cache_memory_bytes=_cache_bytes(shape, dtype, length, most), enforce_eager=config.eager,
                enable_prefix_caching=False, skip_tokenizer_init=True, gpu_memory_utilization=_SHARE, seed=0,
            )  # fmt: skip
            if "error" in facts:
                raise DLRError(f"vLLM does not start with the {side} model: {facts['error']}")
            if facts["device"] != device.type:
                raise DLRError(
                    f"this vLLM runs on {facts['device']!r}, and the best device here is {device.type!r}: "
                    "install vLLM for it, or hide it (CUDA_VISIBLE_DEVICES=)"
                )
        except BaseException:
            self.close()
            raise
        self.dtype = dtype_name(dtype)
        self.threads: int = facts["threads"]
        self.versions = {"vllm": facts["version"]}
        self.weights_bytes: int | None = None  # on a CPU vLLM repacks them

    def run(self, batch: int, prompt: int, new_tokens: int) -> dict[str, Any]:
        answer = self._ask(batch=batch, prompt=prompt, new_tokens=new_tokens)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process, which has then no work to lose."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._died()
        return json.loads(answer)

    def _died(self) -> NoReturn:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)
        status = self._process.returncode
        how = "closed its output" if status is None else f"ended with status {status}"
        if status is not None and status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            how += " (memory may have run out)" if -status == signal.SIGKILL else ""
        self._log.seek(0)
        said = [line.strip() for line in self._log if line.strip()]
        last = f"; it said last: {said[-1][:300]}" if said else ""
        raise DLRError(f"vLLM with the {self._side} model {how}{last}")


@contextmanager
def opened_in_vllm(side: str, source: str | Path, config: SpeedConfig) -> Iterator[VLLMModel]:
    """A model by its name, a directory or a name on the hub, in an engine that ends with the block.

    Raises:
        DLRError: There is no such model, it is none for vLLM, or the engine does not start.
    """
    if Path(source).expanduser().is_file():
        raise DLRError(
            f"vLLM takes {source} from no file here: give the {side} model as a directory or hub id"
        )
    folder = model_folder(source)
    check_readable(folder, "config.json", "*.safetensors", "*.index.json")
    try:
        model = VLLMModel(side, folder, config)
    except (OSError, ValueError) as error:  # of its config
        raise DLRError(f"{folder} does not load: {first_line(error)}") from error
    try:
        yield model
    finally:
        model.close()


def _cache_bytes(shape: PretrainedConfig, dtype: torch.dtype, length: int, batch: int) -> int:
    """Bytes of keys and values that so many sequences of a length want, with room to spare."""
    text = shape.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    blocks = batch * (-(-length // _BLOCK) + 1) + 8  # vLLM keeps some of its own
    return blocks * _BLOCK * 2 * text.num_hidden_layers * heads * width * dtype.itemsize
