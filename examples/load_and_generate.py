"""Loads a locked checkpoint the transformers way and completes a text with it.

python examples/load_and_generate.py out "Once upon a time"
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dlr_lock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="directory of a locked checkpoint")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    options = parser.parse_args()

    # An installed package has told transformers how a locked checkpoint loads; without it loading fails on a tripwire.
    # dlr_lock.load(checkpoint) is the same and moves the model to the best device.
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    locked = [name for name, module in model.named_modules() if isinstance(module, dlr_lock.DLRNet)]
    print(f"{len(locked)} locked modules: {', '.join(locked)}")

    inputs = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    with torch.no_grad():  # the fused forward has no backward
        output = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
