"""A small batch server on standard input and output: a prompt a line in, a JSON object a line out.

printf 'Once upon a time\nThe river\n' | python examples/serve.py out --batch 8

Prompts are taken as they come, up to --batch at a time, padded on the left and completed together over a static
cache. `dlr-lock serve` is a real server (docs/serving.md): this shows what transformers alone gives.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import dlr_lock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="directory of a locked checkpoint")
    parser.add_argument("--batch", type=int, default=8, help="prompts that are completed together, at most")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    options = parser.parse_args()

    model = dlr_lock.load(options.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = (line.strip() for line in sys.stdin if line.strip())
    while prompts := list(islice(lines, options.batch)):
        for prompt, text in zip(
            prompts, complete(model, tokenizer, prompts, options.max_new_tokens), strict=True
        ):
            print(json.dumps({"prompt": prompt, "completion": text}), flush=True)


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], new: int
) -> Iterator[str]:
    """The greedy completions of prompts, in their order."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    with torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=new, do_sample=False, cache_implementation="static",
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    yield from tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
