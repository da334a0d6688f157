"""A plan against the conversion that it is of: what is counted is the same, without a weight being read."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ENCODERS, save_tiny, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM

from dlr_lock import DLRError, DLRNet, DLRSpec
from dlr_lock.audit.meters import Meter
from dlr_lock.convert.activations import Activations, SequentialCalibrator
from dlr_lock.convert.config import ConversionConfig, Recipe
from dlr_lock.convert.distill import distill
from dlr_lock.convert.mlp_discovery import find_mlps
from dlr_lock.planning.plan import Plan, plan_conversion
from dlr_lock.planning.rates import GPUS
from dlr_lock.planning.subject import mlps_by_shape, open_subject
from dlr_lock.planning.work import Amounts, phases, step_of

CHOICES: dict[str, Any] = {
    "tokens": 512, "heldout": 128, "train_tokens": 1024, "batch": 64, "sequence": 32, "depth": 3, "rank": 16,
    "redistill": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("plan") / "source", layers=4)


def planned(folder: Path, **choices: Any) -> Plan:
    return plan_conversion(folder, device="h200", data="text.txt", **(CHOICES | choices))


@pytest.mark.parametrize(
    "arch", ["bert", "bloom", "falcon", "gemma2", "gpt2", "llama", "mpt", "olmo2", "opt", "phi3"]
)
def test_the_same_mlps_without_numbers_as_by_running_them(arch: str) -> None:
    with torch.device("meta"):
        skeleton = (AutoModel if arch in ENCODERS else AutoModelForCausalLM).from_config(tiny_config(arch))
    facts = ("module", "identity", "layer", "hidden_size", "intermediate_size", "params", "gated")
    by_shape, by_running = (
        [[getattr(mlp, fact) for fact in facts] for mlp in found]
        for found in (mlps_by_shape(skeleton), find_mlps(tiny_model(arch)))
    )
    assert by_shape == by_running


def test_a_step_computes_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("dlr_lock.convert.distill.ThreadPoolExecutor", _InPlace)
    spec = DLRSpec(64, 1, 3, 16)
    x, y = torch.randn(2, 256, 64)
    flops = []
    for steps in (1, 3):
        meter = Meter()
        with meter:
            recipe = Recipe(64 * steps, batch=64, init="random")
            first = torch.zeros(256, dtype=torch.bool)
            distill(Activations(x, y, first, False), 256, spec, recipe, name="it", device=torch.device("cpu"))
        flops.append(meter.take().flops)
    assert (flops[1] - flops[0]) / 2 == pytest.approx(step_of(spec, Recipe(64, batch=64), 1).flops, rel=0.02)


class _InPlace:
    """A pool whose work is done by whoever asks for it, where the meter sees it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def shutdown(self) -> None: ...


def test_a_layer_computes_what_was_reckoned(folder: Path) -> None:
    config = ConversionConfig.of(CHOICES).resolved(torch.device("cpu"))
    amounts = Amounts.of(open_subject(folder, config), config)
    model = tiny_model("llama", layers=4)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, 32, dtype=torch.int64))
    assert counter.get_total_flops() == pytest.approx(32 * amounts.pass_flops, rel=0.02)


@pytest.mark.parametrize("layers", ["all", "1,3", "3"])
def test_layers_are_run_as_often_as_planned(layers: str, folder: Path) -> None:
    """What the calibrator runs, counted in tokens that pass a layer, against what the plan takes it for."""
    config = ConversionConfig.of(CHOICES | {"layers": layers}).resolved(torch.device("cpu"))
    amounts = Amounts.of(open_subject(folder, config), config)
    model, mlps = tiny_model("llama", layers=4), amounts.subject.mlps
    run = [0]

    def count(module: Any, args: Any, output: torch.Tensor) -> None:
        run[0] += output.shape[0] * output.shape[1]

    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(count)
    text = torch.randint(320, (amounts.tokens // 32, 32))
    calibrator = SequentialCalibrator(model, mlps, text, max_memory=10**9, scratch=folder)
    for mlp, spec in zip(mlps, amounts.specs, strict=True):
        calibrator.pairs(mlp).close()
        calibrator.put(mlp, DLRNet(spec))
    (phase,) = [p for p in phases(amounts) if p.name == "activations"]
    chains = sum(2 * spec.params for spec in amounts.specs) * amounts.tokens
    assert run[0] == pytest.approx((phase.wide - chains) / amounts.layer_flops, rel=0.1)


def test_bytes_are_those_of_the_files(folder: Path) -> None:
    plan = planned(folder)
    reading = plan.phases[0]
    numbers = sum(p.numel() for p in tiny_model("llama", layers=4).parameters())
    assert plan.params == numbers and reading.disk == 4 * numbers
    assert plan.modules[0]["chain"] == "1x3x16 silu" and len(plan.modules) == plan.mlps == 4


def test_more_work_is_a_longer_plan(folder: Path) -> None:
    once, twice = planned(folder), planned(folder, train_tokens=2048)
    of = {p.name: p.fit for p in once.phases}
    assert {p.name: p.fit for p in twice.phases}["distilling"] == 2 * of["distilling"]
    assert planned(folder, redistill=1.0).flops > once.flops > planned(folder, layers="0").flops
    assert planned(folder, max_memory=1000).disk > once.disk


def test_what_would_shorten_it_was_tried(folder: Path) -> None:
    plan = planned(folder, train_tokens=2**17, redistill=20.0)
    advice = next(line for line in plan.advice if line.startswith("--redistill 0 "))
    share = planned(folder, train_tokens=2**17).seconds / plan.seconds
    assert f"{share:.0%} of the time" in advice


@pytest.mark.parametrize("gpu", GPUS)
def test_a_gpu_that_is_not_here_is_reckoned_and_says_so(gpu: str, folder: Path) -> None:
    plan = plan_conversion(folder, device=gpu.upper(), **CHOICES)
    assert math.isfinite(plan.seconds) and plan.device > 0 and "reckoned" in plan.rates.how


def test_eight_billion_parameters_are_planned_from_their_headers(tmp_path: Path) -> None:
    """Of the weights there is a header alone, as of a repository whose weights were not fetched."""
    config = tiny_config(
        "llama", layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    header = json.dumps(
        {"w": {"dtype": "BF16", "shape": [8_030_261_248], "data_offsets": [0, 16_060_522_496]}}
    ).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 16_060_522_496)  # a hole: no block of the disk is taken
    plan = plan_conversion(tmp_path, device="h200", data="text.txt", effort="standard")
    assert plan.params == 8_030_261_248 and len(plan.modules) == 32
    assert plan.disk > 2 * 16_060_522_496 and plan.device > 16e9
    assert 1 < plan.seconds / 3600 < 100


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "model_type None"),
        ({"model_type": "llama", "hidden_size": "wide"}, "makes no model"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "dlr"}}, "already locked"),
    ],
)
def test_what_is_no_model_is_refused_in_a_line(config: dict, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DLRError, match=words):
        planned(tmp_path)


def test_weights_that_are_cut_short_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(DLRError, match="truncated or damaged"):
        planned(tmp_path)


def test_an_unknown_gpu_names_those_that_are_known(folder: Path) -> None:
    with pytest.raises(DLRError, match="h200"):
        plan_conversion(folder, device="h900")


@pytest.mark.parametrize(
    ("arch", "kind"), [("mixtral", "a mixture of experts"), ("t5", "an encoder-decoder")]
)
def test_what_is_not_reckoned_says_so(arch: str, kind: str, tmp_path: Path) -> None:
    save_tiny(arch, tmp_path / arch)
    with pytest.raises(DLRError, match=f"is {kind}: convert locks it, but"):
        planned(tmp_path / arch)
