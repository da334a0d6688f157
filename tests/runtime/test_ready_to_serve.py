"""A loaded model is ready to serve: nothing is left to prepare, and what servers ask of `generate` gives the same
tokens as one prompt after another."""

import gc
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch
from locked import locked_tiny
from tiny import VOCABULARY, tiny_tokenizer
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel, TextIteratorStreamer

from dlr_lock.runtime import load, locked_modules, module
from dlr_lock.triton_kernels import backend, native

NEW = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ready")
    torch.manual_seed(0)
    locked_tiny("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return load(checkpoint, device="cpu")


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def new_tokens(model: PreTrainedModel, ids: Tensor, **choices: object) -> list[list[int]]:
    choices = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 2} | choices
    output = model.generate(ids, max_new_tokens=NEW, do_sample=False, **choices)
    return output[:, ids.shape[1] :].tolist()


def test_gram_blocks_are_made_once_for_all_that_follows(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    blocks = module.gram_blocks
    monkeypatch.setattr(module, "gram_blocks", lambda *a, **k: made.append(0) or blocks(*a, **k))
    with backend("lookahead"):  # what reads them on a CPU; on a GPU it is the default
        model = load(checkpoint, device="cpu")
        chains = len(locked_modules(model))
        assert chains == len(made) == 2
        new_tokens(model, prompt(12))
    assert len(made) == chains


@pytest.mark.skipif(
    not (sys.platform == "linux" and shutil.which("g++")),
    reason="no C++ compiler",
)
def test_what_runs_few_tokens_is_compiled_when_a_model_is_loaded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DLR_LOCK_CACHE", str(tmp_path))
    native.library.cache_clear()
    try:
        model = load(checkpoint, device="cpu")
        assert [path.suffix for path in (tmp_path / "native").iterdir()] == [".so"]
        monkeypatch.setattr(subprocess, "run", lambda *command, **more: pytest.fail(f"ran {command}"))
        new_tokens(model, prompt(12))
    finally:
        native.library.cache_clear()


def test_a_static_cache_compiles_to_one_graph_without_breaks(checkpoint: Path) -> None:
    model = load(checkpoint, device="cpu")
    eager = new_tokens(model, prompt(12))
    torch._dynamo.reset()
    counters.clear()
    # As generate() does it by itself on a GPU. The tests' graphs run as they were traced: no C++ compiler is needed.
    compiling = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    compiled = new_tokens(model, prompt(12), cache_implementation="static", compile_config=compiling)
    assert compiled == eager
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_text_that_is_streamed_is_the_text(model: PreTrainedModel) -> None:
    tokenizer, ids = tiny_tokenizer(), prompt(9)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    choices = {"streamer": streamer, "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    thread = Thread(target=model.generate, args=(ids,), kwargs=choices | {"pad_token_id": 2})
    thread.start()
    pieces = list(streamer)
    thread.join(60)
    assert len(pieces) > 1 and "".join(pieces) == tokenizer.decode(new_tokens(model, ids)[0])


def test_prompts_padded_on_the_left_go_on_as_they_do_alone(model: PreTrainedModel) -> None:
    prompts = [prompt(length, seed=length) for length in (3, 17, 9)]
    longest = max(ids.shape[1] for ids in prompts)
    ids = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0), value=2) for p in prompts])
    mask = torch.cat(
        [torch.nn.functional.pad(torch.ones_like(p), (longest - p.shape[1], 0)) for p in prompts]
    )
    together = new_tokens(model, ids, attention_mask=mask)
    assert together == [new_tokens(model, p)[0] for p in prompts]


@pytest.mark.parametrize("chunk", [7, 32])
def test_a_long_prompt_in_chunks_goes_on_as_at_once(model: PreTrainedModel, chunk: int) -> None:
    ids = prompt(100)
    assert new_tokens(model, ids, prefill_chunk_size=chunk) == new_tokens(model, ids)


_PEAK = """
import sys, torch
from dlr_lock.runtime import load
from transformers.models.llama import modeling_llama

def peak():
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(1)
load(sys.argv[1], device="cpu")(input_ids=torch.tensor([[3, 4]]))  # all is imported and set up
base = peak()
model = load(sys.argv[2], device="cpu")
for weight in model.parameters():
    weight.sum()  # loading maps the files alone: a page is in memory once it is read
print(peak() - base)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_memory_of_the_weights_once(checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    locked_tiny("llama", hidden_size=512, vocab_size=32_000).save_pretrained(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size > 80e6
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(checkpoint), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert 0.8 * size < int(done.stdout) <= 1.2 * size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_checkpoint_that_was_converted_is_not_kept_in_memory(tmp_path: Path) -> None:
    locked_tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path)

    def mapped() -> bool:
        gc.collect()
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    model = load(tmp_path, device="cpu", dtype="bfloat16")
    assert mapped()  # the weights themselves are: no second copy is made
    del model
    model = load(tmp_path, device="cpu", dtype="float32")
    assert not mapped() and model.dtype == torch.float32
