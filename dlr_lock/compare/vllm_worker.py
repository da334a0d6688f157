"""One model in vLLM, in a process of its own: `python -m dlr_lock.compare.vllm_worker`, for `vllm_model.VLLMModel`.

It is asked by lines of JSON on standard input and answers each by one on standard output; it ends with its input. The
first line has the arguments of `vllm.LLM`. Each further one asks for a run: "batch" random prompts of "prompt" tokens,
once for one new token each and once for "new_tokens". An answer has "error" where that failed.
"""

import json
import os
import sys
import time
from typing import Any

from ..common.memory import watch_memory

_LONGEST = 300  # characters of an error that is told


class Engine:
    """vLLM's engine in this process, so that this process's memory is all of its."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        import torch
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform
        from vllm.version import __version__

        self._sampling, self._torch = SamplingParams, torch
        self._llm = LLM(**arguments)
        self._vocabulary = self._llm.model_config.get_vocab_size()
        self._device = current_platform.device_type
        self.facts = {
            "version": __version__,
            "device": self._device,
            "threads": torch.get_num_threads(),
        }

    def run(self, batch: int, prompt: int, new_tokens: int) -> dict[str, Any]:
        """Seconds to the first token of every sequence and for the others, and the process's memory at its peak."""
        source = self._torch.Generator().manual_seed(batch)
        ids = self._torch.randint(self._vocabulary, (batch, prompt), generator=source).tolist()
        peak = watch_memory(self._device)
        first = self._seconds(ids, 1)
        decode = self._seconds(ids, new_tokens) - first
        if decode <= 0:
            raise RuntimeError("decoding took less time than prefill varies by: ask for more --new-tokens")
        _, peak_bytes = peak() or (None, None)
        return {"first_token_s": first, "decode_s": decode, "peak_bytes": peak_bytes}

    def _seconds(self, prompts: list[list[int]], new: int) -> float:
        sampling = self._sampling(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        began = time.perf_counter()
        answers = self._llm.generate(asked, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        for answer in answers:
            if len(answer.outputs[0].token_ids) != new:
                raise RuntimeError(f"{len(answer.outputs[0].token_ids)} tokens came instead of {new}")
        return seconds


def _line(error: BaseException) -> str:
    """An error in a line that is not long. Of a wrong argument pydantic's own text is mostly the arguments."""
    listed = getattr(error, "errors", None)
    words = "; ".join(one["msg"] for one in listed()) if callable(listed) else str(error)
    text = " ".join(words.split()) or type(error).__name__
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def main() -> None:
    """Answers until there is no more to answer."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM prints is no answer
    engine: Engine | None = None
    for asked in sys.stdin:
        try:
            if engine is None:
                engine = Engine(json.loads(asked))
                answer = engine.facts
            else:
                answer = engine.run(**json.loads(asked))
        except Exception as error:
            answer = {"error": _line(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
