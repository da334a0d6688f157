"""The memory of a conversion whose model is larger than it: a random Llama of 8B shapes, two of its layers locked.

    python -m benchmarks.memory --folder scratch --limit 12
    python -m benchmarks.memory --folder scratch --layers 0-1 --shape 1b --limit 4

The model, 16 GB in bfloat16, is made shard by shard in the folder and deleted at the end, with its locked copy. The
conversion runs in a process of its own, which is watched, and ended where it holds more than the limit. Writes JSON:
the peak of resident memory, mapped files included, and the peak of each phase. Exit status 1 where the limit was not
kept, 2 on bad input.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dlr_lock import DLRError
from dlr_lock.common.files import check_space
from dlr_lock.common.machine import machine

from .output import target, write_json

# Hidden size, intermediate size, layers, heads, key-value heads, vocabulary.
SHAPES = {
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (64, 160, 4, 4, 2, 320),
}
_POOL = 2**25  # random numbers, cut up anew for every matrix
_PHASES = ("reading", "calibration text", "activations", "distilling", "redistilling", "writing", "measuring")

_CONVERT = """
import json, sys
from dlr_lock import convert_model
source, out, options = sys.argv[1:]
def progress(what, done, total):
    print(what, flush=True)
report = convert_model(source, out, progress=progress, **json.loads(options))
print("report", json.dumps(report.to_dict()), flush=True)
"""


def main(arguments: list[str] | None = None) -> int:
    """Makes the model, converts it under the watch and writes what was seen."""
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--folder", type=Path, required=True, help="Where the model and its locked copy may lie."
    )
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--limit", type=float, default=12.0, help="GiB of resident memory.")
    parser.add_argument("--layers", default="0-1")
    parser.add_argument("--max-memory", default="2GiB")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--train-tokens", type=int, default=256)
    parser.add_argument("--keep", action="store_true", help="Leave the model where it is, for the next run.")
    parser.add_argument("--out", type=Path, default=None, help="Folder of the JSON.")
    options = parser.parse_args(arguments)
    source, locked = options.folder / "model", options.folder / "locked"
    try:
        size = 2 * _parameters(*SHAPES[options.shape])
        if not (source / "model.safetensors.index.json").is_file():
            check_space(options.folder, round(2.5 * size))
            make_llama(source, *SHAPES[options.shape])
        choices = {
            "layers": options.layers, "max_memory": options.max_memory, "tokens": options.tokens, "sequence": 32,
            "heldout": 32, "train_tokens": options.train_tokens, "batch": 128, "redistill": 0.0, "effort": "quick",
            "device": "cpu", "data": str(_text(options.folder)),
        }  # fmt: skip
        seen = watched(source, locked, choices, options.limit)
    except DLRError as error:
        print(f"benchmarks.memory: {error}", file=sys.stderr)
        return 2
    finally:
        if not options.keep:
            shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(locked, ignore_errors=True)
    choices.pop("data")
    document = machine(torch.device("cpu")) | {
        "shape": options.shape, "model_bytes": size, "limit_gib": options.limit, "options": choices, **seen,
    }  # fmt: skip
    path = target(document, f"memory-{options.shape}", options.out)
    write_json(path, document)
    print(f"peak {seen['peak'] / 2**30:.2f} GiB of a model of {size / 2**30:.1f}; written to {path}")
    return 0 if seen["finished"] and seen["peak"] < options.limit * 2**30 else 1


def _parameters(d: int, f: int, layers: int, heads: int, kv: int, vocabulary: int) -> int:
    return layers * (2 * d * d + 2 * d * d * kv // heads + 3 * d * f + 2 * d) + 2 * vocabulary * d + d


def make_llama(folder: Path, d: int, f: int, layers: int, heads: int, kv: int, vocabulary: int) -> None:
    """A random Llama in bfloat16, a shard a layer: one layer is in memory at a time. It has no tokenizer of its own
    but one of bytes."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(
        hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, max_position_embeddings=2048, dtype="bfloat16",
        architectures=["LlamaForCausalLM"], tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    ).save_pretrained(folder)  # fmt: skip
    _byte_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    pool = (0.02 * torch.randn(_POOL, generator=generator)).bfloat16()

    def matrix(*shape: int) -> Tensor:
        left, parts = shape[0] * shape[1], []
        while left:
            at = int(torch.randint(_POOL // 2, (), generator=generator))
            parts.append(pool[at : at + min(left, _POOL // 2)])
            left -= len(parts[-1])
        return torch.cat(parts).view(shape)

    files: dict[str, str] = {}
    for number in range(layers + 1):
        name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        if number == layers:
            tensors = {
                "model.embed_tokens.weight": matrix(vocabulary, d), "lm_head.weight": matrix(vocabulary, d),
                "model.norm.weight": torch.ones(d, dtype=torch.bfloat16),
            }  # fmt: skip
        else:
            narrow = d * kv // heads
            shapes = {
                "self_attn.q_proj": (d, d), "self_attn.k_proj": (narrow, d), "self_attn.v_proj": (narrow, d),
                "self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
            }  # fmt: skip
            tensors = {
                f"model.layers.{number}.{part}.weight": matrix(*shape) for part, shape in shapes.items()
            }
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{number}.{norm}.weight"] = torch.ones(d, dtype=torch.bfloat16)
        save_file(tensors, folder / name, {"format": "pt"})
        files |= dict.fromkeys(tensors, name)
    index = {
        "metadata": {"total_size": 2 * _parameters(d, f, layers, heads, kv, vocabulary)},
        "weight_map": files,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: at for at, letter in enumerate(["<s>", "</s>", *letters])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _text(folder: Path) -> Path:
    from dlr_lock.convert.data import english_topics

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "text.txt"
    path.write_text(english_topics(), encoding="utf-8")
    return path


def watched(source: Path, out: Path, choices: dict[str, Any], limit: float) -> dict[str, Any]:
    """Converts in a process of its own, whose resident memory is read ten times a second.

    Returns:
        peak (bytes), finished, the largest reading of each phase, and the conversion's own report.
    """
    shutil.rmtree(out, ignore_errors=True)
    log = out.with_suffix(".log")
    phases: dict[str, int] = {}
    peak = 0
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", _CONVERT, str(source), str(out), json.dumps(choices)],
            stdout=file,
            stderr=file,
        )
        while process.poll() is None:
            held, most = _memory(process.pid)
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            now = next((n for n in _PHASES if lines and lines[-1].startswith(n)), "other")
            phases[now] = max(phases.get(now, 0), held)
            peak = max(peak, most)
            if held > (limit + 1) * 2**30:
                process.kill()
            time.sleep(0.1)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    report = next((json.loads(line.partition(" ")[2]) for line in lines if line.startswith("report ")), None)
    log.unlink()
    if process.returncode not in (0, -9):
        raise DLRError(f"the conversion failed: {lines[-1] if lines else process.returncode}")
    kept = ("modules", "evaluation", "seconds", "params_original", "params_locked", "across")
    facts = {name: report[name] for name in kept} if report else None
    return {"peak": peak, "finished": report is not None, "phases": phases, "report": facts}


def _memory(pid: int) -> tuple[int, int]:
    """A process's resident memory and its peak, in bytes; 0 where it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0, 0
    found = {name: re.search(rf"{name}:\s+(\d+)", text) for name in ("VmRSS", "VmHWM")}
    held, most = (1024 * int(m[1]) if m else 0 for m in found.values())
    return held, most


if __name__ == "__main__":
    sys.exit(main())
