"""A model that is larger than the memory that it may take: the same bits, and no more memory for more layers."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model
from transformers import AutoModelForCausalLM

from dlr_lock import DLRError, convert_model
from dlr_lock.common.weights import OnDemand, awake
from dlr_lock.convert.data import english_topics
from dlr_lock.convert.evaluate import evaluate
from dlr_lock.convert.layer_runner import LayerRunner, layer_by_layer
from dlr_lock.convert.mlp_discovery import find_mlps
from dlr_lock.convert.source import open_source

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {
    "tokens": 1024, "heldout": 256, "train_tokens": 1024, "batch": 128, "sequence": 64, "depth": 3, "rank": 16,
}  # fmt: skip
MIB = 2**20


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text(english_topics()[:40_000], encoding="utf-8")
    return path


def as_bfloat16(folder: Path) -> None:
    """The same model, its files in bfloat16 but for one matrix that keeps float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].float() + 1e-4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {"redistill": 0.25}),
        ("gpt2", {"across": "independent"}),
        ("opt", {"layers": "1"}),
        ("llama-bfloat16", {}),
        ("llama-bfloat16", {"dtype": "float32"}),
    ],
)
def test_a_model_larger_than_its_room_gives_the_same_bits(
    arch: str, options: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    save_tiny(arch.partition("-")[0], tmp_path / "source", layers=4)
    if "bfloat16" in arch:
        as_bfloat16(tmp_path / "source")
    reports = [
        convert_model(
            tmp_path / "source", tmp_path / name, data=str(text), max_memory=room, **(QUICK | options)
        )
        for name, room in (("roomy", "1GiB"), ("tight", "100K"))
    ]
    roomy, tight = (load_file(tmp_path / name / "model.safetensors") for name in ("roomy", "tight"))
    assert roomy.keys() == tight.keys()
    assert all(torch.equal(roomy[n], tight[n]) and roomy[n].dtype == tight[n].dtype for n in roomy)
    assert reports[0].evaluation == reports[1].evaluation
    assert [m.fidelity for m in reports[0].modules] == [m.fidelity for m in reports[1].modules]


def test_weights_are_there_while_they_are_used_and_no_longer(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, layers=6)
    whole = open_source(tmp_path, dtype=torch.float32, device=CPU).model
    source = open_source(tmp_path, dtype=torch.float32, device=CPU, room=1)
    assert source.weights is not None
    ids = torch.randint(320, (2, 9))
    with torch.no_grad():
        assert torch.equal(source.model(ids).logits, whole(ids).logits)
    layer = sum(4 * p.numel() for p in whole.model.layers[0].parameters())
    assert source.weights.peak <= 2 * layer
    away = source.model.model.layers[0].mlp.up_proj
    assert away.weight.isnan().all() and away.weight.shape == (160, 64)
    assert torch.equal(awake(away).weight, whole.model.layers[0].mlp.up_proj.weight)
    source.weights.release()
    assert away.weight.isnan().all()


def test_a_text_layer_by_layer_is_the_models_own(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=3)
    ids = torch.randint(320, (5, 16))
    runner = LayerRunner(model, find_mlps(model), ids)
    with torch.no_grad():
        wanted = [model(part).logits for part in ids.split(2)]
    got = [output.logits for output in layer_by_layer(runner, ids, 2)]
    assert all(torch.equal(one, two) for one, two in zip(got, wanted, strict=True))
    assert torch.is_grad_enabled()
    passes = tuple(lambda tokens, at_once: layer_by_layer(runner, tokens, at_once) for _ in "ab")
    assert evaluate(model, ids, original=model, passes=passes) == evaluate(model, ids, original=model)


def test_numbers_that_are_not_finite_are_found_without_loading_them(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DLRError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN or infinity"):
        open_source(tmp_path, dtype=torch.float32, device=CPU, room=1)


_CUT = """
import os, sys, torch
from dlr_lock.convert.source import open_source
folder, room = sys.argv[1:]
source = open_source(folder, dtype=torch.float32, device=torch.device("cpu"), room=int(room))
file = folder + "/model.safetensors"
os.truncate(file, os.path.getsize(file) // 2)
with torch.no_grad():
    print(source.model(torch.ones(1, 9, dtype=torch.long)).logits.isfinite().all().item())
"""


@pytest.mark.parametrize(
    ("room", "says"), [(1, "model.safetensors was cut short while it was read"), (2**30, "True")]
)
def test_a_file_that_is_cut_short_kills_nobody(room: int, says: str, tmp_path: Path) -> None:
    """Who reads a mapped file beyond its end is killed by the system, in a process of its own here."""
    save_tiny("llama", tmp_path, layers=6)
    done = subprocess.run(
        [sys.executable, "-c", _CUT, str(tmp_path), str(room)], capture_output=True, text=True
    )
    assert done.returncode == (room == 1) and says in done.stdout + done.stderr, done


def test_the_end_to_end_phase_of_a_model_without_room_is_refused_at_once(text: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    with pytest.raises(DLRError, match="end-to-end phase wants all"):
        convert_model(
            tmp_path / "source", tmp_path / "out", data=str(text), max_memory="100K", end_to_end=512, **QUICK
        )
    assert not (tmp_path / "out").exists()


CONVERT = """
import json, re, sys
from dlr_lock import convert_model
from dlr_lock.convert import writing
writing.SHARD = "8MB"  # what a shard is written from is in memory; the default is larger than these models
source, out, options = sys.argv[1:]
convert_model(source, out, **json.loads(options))
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
"""
# What is freed goes back to the system at once: held by the allocator it was counted by chance, 10 to 29 MiB.
AS_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is Linux' own figure")
def test_memory_does_not_grow_with_the_layers(text: Path, tmp_path: Path) -> None:
    """Three layers and fifteen, all of them converted, each conversion in a process of its own."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
    options = QUICK | {"tokens": 256, "heldout": 64, "train_tokens": 128, "rank": 64, "data": str(text)}
    peaks = {}
    for room in ("1GiB", "100K"):
        for layers in (3, 15):
            source = tmp_path / f"source-{layers}"
            if not source.exists():
                save_tiny("llama", source, layers=layers, **sizes)
            given = [
                str(source),
                str(tmp_path / f"out-{layers}-{room}"),
                json.dumps(options | {"max_memory": room}),
            ]
            done = subprocess.run(
                [sys.executable, "-c", CONVERT, *given],
                capture_output=True,
                text=True,
                timeout=300,
                check=True,
                env=os.environ | AS_FREED,
            )
            peaks[room, layers] = int(done.stdout.split()[-1])
    # 12 layers more are 48 MiB of weights in float32.
    whole, bounded = (peaks[room, 15] - peaks[room, 3] for room in ("1GiB", "100K"))
    print(whole / MIB, bounded / MIB)
    assert whole > 40 * MIB and bounded < whole / 2, (whole, bounded)


def test_a_copy_of_a_model_asks_for_the_same_weights(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=3)
    ids = torch.randint(320, (1, 5))
    with torch.no_grad():
        wanted = model(ids).logits
        OnDemand(model, stored=torch.float32, dtype=torch.float32, device=CPU, room=1)
        twin = copy.deepcopy(model, memo={id(t): t for t in [*model.parameters(), *model.buffers()]})
        assert torch.equal(twin(ids).logits, wanted) and torch.equal(model(ids).logits, wanted)
