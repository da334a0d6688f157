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
from transformers import AutoConfig

from dlr_lock.runtime import DLRSpec, ExpertsSpec
from dlr_lock.runtime.config import DLRConfig

PROMPTS = [[5, 6, 7], [100, 200, 30, 44, 51, 18], list(range(3, 60)), [9] * 20]
NEW = 24
HEADS = {"num_attention_heads": 2}  # of 32 features: vLLM's CPU attention has no narrower ones
GROUPED = {**HEADS, "num_key_value_heads": 2, "head_dim": 32}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen3": GROUPED,
    "gemma2": GROUPED,
    "gpt2": {"n_head": 2},
    "opt": HEADS,  # the chain stands where a linear layer stood, which returns a pair
    "falcon": HEADS,  # its MLP returns a pair, and leaves the sum over ranks to the layer
    "helium": GROUPED,  # vLLM has no class of its own for it
    "gpt_neox": HEADS,  # nor for this, and its head has another name in the checkpoint
    "mixtral": GROUPED,  # its experts have another name in the checkpoint than in the model
    "qwen3_moe": GROUPED,
}
# A tensor that is taken out of llama's checkpoint, and what is said of it.
MISSING = {
    "model.layers.1.mlp.dlr_B": "no model.layers.1.mlp.dlr_B",
    "model.layers.0.self_attn.o_proj.weight": "no model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.self_attn.q_proj.weight": "only a part of model.layers.0.self_attn.qkv_proj.weight",
}
ONE_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0"
}  # else every engine is a process, which imports vLLM again


def run(
    jobs: list[tuple[Path, dict[str, Any]]], environment: dict[str, str] | None = None
) -> tuple[list[dict[str, Any]], str]:
    """What vLLM says of each checkpoint with some options, and all that was printed."""
    asked = [
        {"model": str(folder), "prompts": PROMPTS, "new": NEW, "enforce_eager": True, **options}
        for folder, options in jobs
    ]
    found = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("generate.py")), json.dumps(asked)],
        capture_output=True, text=True, cwd="/", timeout=1800,
        env=os.environ | ENVIRONMENT | (environment or {}),
    )  # fmt: skip
    said = [
        json.loads(line) for line in found.stdout.splitlines() if line.startswith(('{"tokens"', '{"error"'))
    ]
    assert len(said) == len(jobs), (found.stdout + found.stderr)[-4000:]
    return said, found.stdout + found.stderr


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {
        arch: save_locked(arch, tmp_path_factory.mktemp(arch), **config)
        for arch, config in ARCHITECTURES.items()
    }
    made["kept"] = save_locked("mixtral", tmp_path_factory.mktemp("kept"), kept=(1,), **GROUPED)
    return made


@pytest.fixture(scope="module")
def one_after_another(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What one process says of all architectures, of the ways to run one, and of incomplete checkpoints."""
    jobs: dict[str, tuple[Path, dict[str, Any]]] = {arch: (path, {}) for arch, path in checkpoints.items()}
    jobs["backend"] = (checkpoints["llama"], {"model_impl": "transformers"})
    jobs["compiled"] = (checkpoints["llama"], {"enforce_eager": False})
    jobs["compiled mixture"] = (checkpoints["qwen3_moe"], {"enforce_eager": False})
    jobs["kept"] = (checkpoints["kept"], {"enforce_eager": False})  # which cannot be compiled
    for tensor in MISSING:
        folder = save_locked("llama", tmp_path_factory.mktemp("incomplete"), **GROUPED)
        weights = load_file(folder / "model.safetensors")
        del weights[tensor]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        jobs[tensor] = (folder, {})
    said, _ = run(list(jobs.values()), ONE_PROCESS)
    return dict(zip(jobs, said, strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tokens_are_those_of_transformers(
    arch: str, one_after_another: dict[str, Any], checkpoints: dict[str, Path]
) -> None:
    assert one_after_another[arch] == {"tokens": greedy(checkpoints[arch], PROMPTS, NEW)}


@pytest.mark.parametrize(
    ("way", "of"),
    [("backend", "llama"), ("compiled", "llama"), ("compiled mixture", "qwen3_moe"), ("kept", "kept")],
)
def test_ways_to_run_one_model(
    way: str, of: str, one_after_another: dict[str, Any], checkpoints: dict[str, Path]
) -> None:
    assert one_after_another[way] == {"tokens": greedy(checkpoints[of], PROMPTS, NEW)}


@pytest.mark.parametrize("tensor", MISSING)
def test_a_missing_tensor_is_named(tensor: str, one_after_another: dict[str, Any]) -> None:
    said = one_after_another[tensor].get("error", "")
    assert said.startswith(f"the checkpoint has {MISSING[tensor]}"), one_after_another[tensor]


@pytest.mark.parametrize(
    "arch", ["llama", "falcon"]
)  # of which the second adds up the ranks outside of the MLP
def test_two_ranks(arch: str, checkpoints: dict[str, Path]) -> None:
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # by itself vLLM asks for a NUMA node a rank
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    said, printed = run([(checkpoints[arch], options)], binding)
    assert said == [{"tokens": greedy(checkpoints[arch], PROMPTS, NEW)}], printed[-4000:]


def test_without_the_plugin_vllm_refuses(checkpoints: dict[str, Path]) -> None:
    ((said,), printed) = run([(checkpoints["llama"], {})], {"VLLM_PLUGINS": "lora_filesystem_resolver"})
    assert "Unknown quantization method: dlr" in said["error"], printed[-4000:]


def test_a_plugin_that_fails_lets_other_models_start(tmp_path: Path) -> None:
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


def test_a_mixture_beside_other_layers_than_attention_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("jamba", hidden_size=64, num_hidden_layers=2, vocab_size=320)
    config.architectures = ["JambaForCausalLM"]
    spec = ExpertsSpec(DLRSpec(64, 1, 3, 16), config.num_experts)
    config.quantization_config = DLRConfig({"model.layers.1.feed_forward.experts": spec}).to_dict()
    config.save_pretrained(tmp_path)
    ((said,), _) = run([(tmp_path, {})], ONE_PROCESS)
    assert "this model has other layers, such as Mamba's: serve with --engine transformers" in said["error"]


def test_the_key_of_compiled_graphs_has_our_backend(checkpoints: dict[str, Path]) -> None:
    """Else a graph that was compiled with one backend would run, from the cache, where another is asked for."""
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.config import ModelConfig\n"
        f"print('key', ModelConfig(model={str(checkpoints['llama'])!r}, dtype='float32').compute_hash())"
    )
    keys = set()
    for backend in ("auto", "lookahead"):
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd="/",
            env=os.environ | ENVIRONMENT | {"DLR_LOCK_BACKEND": backend},
        )  # fmt: skip
        keys |= {line for line in found.stdout.splitlines() if line.startswith("key ")}
    assert len(keys) == 2, found.stderr[-2000:]
