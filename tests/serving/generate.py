"""What vLLM generates from checkpoints, a line of JSON for each: `python generate.py '[{"model": .., "prompts": ..}]'`.

All in one process, one engine after another, for importing vLLM takes as long as a tiny model's start. Prompts are
lists of tokens, and the likeliest token is taken. A line is {"tokens": [[..], ..]}, or {"error": ".."} with what the
engine raised.
"""

import json
import sys
from typing import Any


def generated(asked: dict[str, Any]) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    prompts, new = asked.pop("prompts"), asked.pop("new")
    engine = LLM(**{"dtype": "float32", "max_model_len": 200, "max_num_seqs": 8, **asked})
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    for asked in json.loads(sys.argv[1]):
        try:
            said: dict[str, Any] = {"tokens": generated(asked)}
        except Exception as error:
            said = {"error": str(error)}
        cleanup_dist_env_and_memory()
        print(json.dumps(said), flush=True)
