"""Locked checkpoints in an unmodified vLLM: the tokens of transformers, or a failure that nobody overlooks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import greedy, save_locked
from safetensors.torch import load_file, save_file
from servers import ENVIRONMENT

PROMPTS = [[5, 6, 7], [100, 200, 30, 44, 51, 18], list(range(3, 60)), [9] * 20]
NEW = 24
HEADS = {"num_attention_heads": 2}  # of 32 features: vLLM's CPU attention has no narrower ones
GROUPED = {**HEADS, "num_key_value_heads": 2, "head_dim": 32}


def run(
    folder: Path, environment: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess:
    asked = {"model": str(folder), "prompts": PROMPTS, "new": NEW, "enforce_eager": True, **options}
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("generate.py")), json.dumps(asked)],
        capture_output=True, text=True, cwd="/", timeout=600,
        env=os.environ | ENVIRONMENT | (environment or {}),
    )  # fmt: skip


def tokens(found: subprocess.CompletedProcess) -> list[list[int]]:
    assert found.returncode == 0, (found.stdout + found.stderr)[-4000:]
    return json.loads(next(line for line in found.stdout.splitlines()[::-1] if line.startswith("[[")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_locked("llama", tmp_path_factory.mktemp("llama"), **GROUPED)


@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("qwen3", GROUPED),
        ("gemma2", GROUPED),
        ("gpt2", {"n_head": 2}),
        ("opt", HEADS),  # the chain stands where a linear layer stood, which returns a pair
        ("falcon", HEADS),  # its MLP returns a pair, and leaves the sum over ranks to the layer
        ("helium", GROUPED),  # vLLM has no class of its own for it
        ("gpt_neox", HEADS),  # nor for this, and its head has another name in the checkpoint
    ],
)
def test_tokens_are_those_of_transformers(arch: str, config: dict[str, Any], tmp_path: Path) -> None:
    save_locked(arch, tmp_path, **config)
    assert tokens(run(tmp_path)) == greedy(tmp_path, PROMPTS, NEW)


@pytest.mark.parametrize(
    "options",
    [{"model_impl": "transformers"}, {"enforce_eager": False}],
    ids=["transformers backend", "compiled"],
)
def test_ways_to_run_one_model(options: dict[str, Any], llama: Path) -> None:
    assert tokens(run(llama, **options)) == greedy(llama, PROMPTS, NEW)


@pytest.mark.parametrize(
    ("arch", "config"),
    [("llama", GROUPED), ("falcon", HEADS)],
    ids=["llama", "falcon, whose layer adds up the ranks"],
)
def test_two_ranks(arch: str, config: dict[str, Any], tmp_path: Path) -> None:
    save_locked(arch, tmp_path, **config)
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # by itself vLLM asks for a NUMA node a rank
    found = run(tmp_path, binding, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert tokens(found) == greedy(tmp_path, PROMPTS, NEW)


def test_without_the_plugin_vllm_refuses(llama: Path) -> None:
    found = run(llama, {"VLLM_PLUGINS": "lora_filesystem_resolver"})
    assert found.returncode != 0
    assert "Unknown quantization method: dlr" in found.stdout + found.stderr


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        ("model.layers.1.mlp.dlr_B", "no model.layers.1.mlp.dlr_B"),
        ("model.layers.0.self_attn.o_proj.weight", "no model.layers.0.self_attn.o_proj.weight"),
        ("model.layers.0.self_attn.q_proj.weight", "only a part of model.layers.0.self_attn.qkv_proj.weight"),
    ],
    ids=["chain", "stock", "a third of a stock"],
)
def test_a_missing_tensor_is_named(tensor: str, says: str, tmp_path: Path) -> None:
    save_locked("llama", tmp_path, **GROUPED)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[tensor]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = run(tmp_path)
    assert found.returncode != 0
    assert f"the checkpoint has {says}" in found.stdout + found.stderr


def test_a_plugin_that_fails_lets_other_models_start(llama: Path, tmp_path: Path) -> None:
    """A module of a name that ours imports, and that fails, stands for what an upgrade may break."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['dlr_lock.runtime.vllm.quantization'] = None\n"
    )
    code = "from vllm.plugins import load_general_plugins; load_general_plugins(); print('started')"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/",
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert found.returncode == 0 and "started" in found.stdout
    assert "no locked model can be served" in found.stdout + found.stderr


def test_the_key_of_compiled_graphs_has_our_backend(llama: Path) -> None:
    """Else a graph that was compiled with one backend would run, from the cache, where another is asked for."""
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.config import ModelConfig\n"
        f"print('key', ModelConfig(model={str(llama)!r}, dtype='float32').compute_hash())"
    )
    keys = set()
    for backend in ("auto", "lookahead"):
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd="/",
            env=os.environ | ENVIRONMENT | {"DLR_LOCK_BACKEND": backend},
        )  # fmt: skip
        keys |= {line for line in found.stdout.splitlines() if line.startswith("key ")}
    assert len(keys) == 2, found.stderr[-2000:]
