"""What vLLM generates from a checkpoint, as one JSON line: `python generate.py '{"model": .., "prompts": ..}'`.

A process of its own for every engine, as users have; prompts are lists of tokens, and the likeliest token is taken.
"""

import json
import sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    asked = json.loads(sys.argv[1])
    prompts, new = asked.pop("prompts"), asked.pop("new")
    engine = LLM(**{"dtype": "float32", "max_model_len": 200, "max_num_seqs": 8, **asked})
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
