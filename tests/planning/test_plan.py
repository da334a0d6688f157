"""A plan against the conversion that it is of: what is counted is the same, without a weight being read."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import CHOICES, planned
from safetensors.torch import save_file
from tiny import ENCODERS, MIXTURES, PAIRED, save_tiny, tiny_config, tiny_model, write_gguf
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from dlr_lock import DLRError, DLRNet, DLRSpec, convert_model
from dlr_lock.cli import app
from dlr_lock.common.hooks import text_inputs
from dlr_lock.common.micro_batch import MicroBatch
from dlr_lock.convert.activations.calibrator import SequentialCalibrator
from dlr_lock.convert.activations.pairs import Activations
from dlr_lock.convert.config import ConversionConfig, Recipe
from dlr_lock.convert.data import english_topics
from dlr_lock.convert.distill import Gradients, distill, muon_groups
from dlr_lock.convert.mlp_discovery import find_mlps
from dlr_lock.convert.muon import Muon
from dlr_lock.convert.outlook.amounts import Amounts
from dlr_lock.convert.outlook.phases import phases
from dlr_lock.convert.outlook.steps import step_of
from dlr_lock.convert.redistill import INITS, student_recipe
from dlr_lock.convert.source import open_source
from dlr_lock.planning.gpus import GPUS
from dlr_lock.planning.plan import plan_conversion
from dlr_lock.planning.subject import mlps_by_shape, open_subject
from dlr_lock.triton_kernels.meter import Meter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("plan") / "source", layers=4)


@pytest.mark.parametrize(
    "arch",
    ["bert", "bloom", "falcon", "gemma2", "gpt2", "llama", "mpt", "olmo2", "opt", "phi3", *PAIRED, *MIXTURES],
)
def test_the_same_mlps_without_numbers_as_by_running_them(arch: str) -> None:
    kind = (
        AutoModel if arch in ENCODERS else AutoModelForSeq2SeqLM if arch in PAIRED else AutoModelForCausalLM
    )
    with torch.device("meta"):
        skeleton = kind.from_config(tiny_config(arch)).eval()
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


WIDE = 4096, 14336  # an 8B model's features, of which an MLP has three matrices


@pytest.mark.parametrize("init", [None, *INITS])
def test_torch_counts_the_same_of_a_step_of_an_8b_model(init: str | None) -> None:
    """A chain's step and its students', as the fit itself computes them, by torch's own counter."""
    d, f = WIDE
    spec, recipe = DLRSpec.of_params(d, 3 * d * f), Recipe(512)
    if init is not None:
        recipe = student_recipe(256, init)
        wide = {"linear": spec_of_half(spec), "flat": DLRSpec(d, 1, 1, spec.depth * spec.rank)}
        spec = wide.get(init) or DLRSpec.of_params(d, 3 * d * f, depth=1, gated=True)
    counted = step_of(spec, recipe, 1)
    with torch.device("meta"):
        weights = {name: torch.empty(spec.weight_shape) for name in DLRNet.weight_names(spec)}
        x, one = torch.empty(recipe.batch + recipe.batch // 128, d), torch.empty(d)
        optimizer = Muon(muon_groups(weights, recipe, torch.empty(d, d)))
        with FlopCounterMode(display=False) as passes:
            Gradients(spec, one, one, MicroBatch("it", "token")).fill(weights, x, x, len(x))
        with FlopCounterMode(display=False) as whole:
            optimizer.step()
        for group in optimizer.param_groups:
            group["preconditioner"] = None
        with FlopCounterMode(display=False) as iteration:
            optimizer.step()
    assert counted.passes == passes.get_total_flops() and counted.muon == iteration.get_total_flops()
    assert counted.reading == whole.get_total_flops() - counted.muon
    assert counted.muon < counted.passes / 3


def spec_of_half(spec: DLRSpec) -> DLRSpec:
    return DLRSpec(spec.hidden_size, 1, 2, -(-spec.depth // 2) * spec.rank)


class _InPlace:
    """A pool whose work is done by whoever asks for it, where the meter sees it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def shutdown(self) -> None: ...


@pytest.mark.parametrize("arch", ["llama", "mixtral", "deepseek_v3", "t5", "bart"])
def test_a_pass_computes_what_was_reckoned(arch: str, tmp_path: Path) -> None:
    config = ConversionConfig.of(CHOICES).resolved(torch.device("cpu"))
    amounts = Amounts.of(open_subject(save_tiny(arch, tmp_path, layers=4), config), config)
    model = tiny_model(arch, layers=4)
    if arch in MIXTURES:
        model.set_experts_implementation("batched_mm")  # which the meter knows the FLOPs of
    meter = Meter()
    with meter, torch.no_grad():
        model(**text_inputs(model, torch.randint(3, 320, (1, 32))))
    # Latent attention of DeepSeek has heads of another width than is reckoned with.
    assert meter.take().flops == pytest.approx(32 * amounts.pass_flops, rel=0.06)


@pytest.mark.parametrize("layers", ["all", "1,3", "3"])
def test_layers_are_run_as_often_as_planned(layers: str, folder: Path) -> None:
    """What the calibrator runs, counted in tokens that pass a layer, against what the plan takes it for."""
    config = ConversionConfig.of(CHOICES | {"layers": layers}).resolved(torch.device("cpu"))
    amounts = Amounts.of(open_subject(folder, config), config)
    model, mlps = tiny_model("llama", layers=4), amounts.subject.mlps
    run, begun = [0], []

    def count(module: Any, args: Any, output: torch.Tensor) -> None:
        run[0] += output.shape[0] * output.shape[1]

    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(count)
    text = torch.randint(320, (amounts.tokens // 32, 32))
    calibrator = SequentialCalibrator(
        model, mlps, text, max_memory=10**9, scratch=folder, progress=lambda done, _: begun.append(done)
    )
    for chains in amounts.chains:
        calibrator.pairs(chains.mlp).close()
        calibrator.put(chains.mlp, DLRNet(chains.spec))
    (phase,) = [p for p in phases(amounts) if p.name == "activations"]
    own = sum(2 * chains.spec.params for chains in amounts.chains) * amounts.tokens
    assert run[0] == pytest.approx((phase.wide - own) / amounts.layer_flops, rel=0.1)
    assert begun.count(0) == SequentialCalibrator.rounds(mlps, mlps)


def test_bytes_are_those_of_the_files(folder: Path) -> None:
    plan = planned(folder)
    reading = plan.phases[0]
    numbers = sum(p.numel() for p in tiny_model("llama", layers=4).parameters())
    assert plan.params == numbers and reading.disk == (folder / "model.safetensors").stat().st_size
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


def test_fewer_layers_are_the_middle_ones_of_those_that_were_asked_for(tmp_path: Path) -> None:
    """The first and the last cost the model most."""
    source = save_tiny("llama", tmp_path / "source", layers=10)
    for layers, half in ((None, "2-6"), ("4-9", "5-7"), ("1,5,8", "5")):
        plan = planned(source, layers=layers, train_tokens=2**26)
        assert any(line.startswith(f"--layers {half}: ") for line in plan.advice), plan.advice
    assert not any("--layers" in line for line in planned(source, layers="3").advice)


def test_layers_that_a_plan_cannot_choose_are_assumed_in_words(folder: Path) -> None:
    plan = planned(folder, layers="auto:2")
    assert [module["layer"] for module in plan.modules] == [1, 2]
    assert any("chosen by the weights" in line and line.endswith("layers 1-2") for line in plan.advice)
    assert "foretelling" in [phase.name for phase in plan.phases]


def test_unasked_what_layers_cost_is_foretold_where_that_is_a_small_part(
    folder: Path, tmp_path: Path
) -> None:
    def share(train_tokens: int, source: Path = folder) -> float | None:
        plan = planned(source, train_tokens=train_tokens, rank=None, redistill=1.0)
        flops = {phase.name: phase.flops for phase in plan.phases}
        return flops["foretelling"] / plan.flops if "foretelling" in flops else None

    assert share(2**10) is None and share(2**22) is None  # of so many nothing was measured
    assert 0 < (share(409_600) or 0) < 0.03
    assert share(409_600, save_tiny("mixtral", tmp_path / "source")) is None


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
    (tmp_path / "tokenizer.json").write_text("{}")
    plan = plan_conversion(tmp_path, device="h200", data="text.txt", effort="standard")
    assert plan.params == 8_030_261_248 and len(plan.modules) == 32
    assert plan.disk > 2 * 16_060_522_496 and plan.device > 16e9
    assert 1 < plan.seconds / 3600 < 2.5
    fits = [phase for phase in plan.phases if phase.muon]
    assert [phase.name for phase in fits] == ["distilling", "redistilling"]
    assert plan.rates.fit == 0.25 * GPUS["h200"].half and plan.rates.muon == 0.6 * GPUS["h200"].single
    for phase in fits:
        assert plan.rates.seconds(phase) >= phase.fit / plan.rates.fit + phase.muon / plan.rates.muon


def test_a_file_that_this_machine_cannot_map_is_planned_for_another(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    size = 2**42
    header = json.dumps({"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    try:
        plan_conversion(tmp_path, device="cpu", data="text.txt", **CHOICES)
    except DLRError as error:
        assert "more than this machine can map at once" in str(error)
    else:
        pytest.skip("this machine maps whatever it is asked to")
    assert planned(tmp_path).disk > size


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


def test_a_gguf_file_is_planned_by_its_header_as_what_it_unpacks_to(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the [gguf] extra is not installed")
    pytest.importorskip("accelerate", reason="the [gguf] extra is not installed")
    model = tiny_model("llama")
    file = write_gguf(model, tmp_path / "tiny.gguf")
    unpacked = open_source(file, dtype="auto", device="cpu", gguf_dir=tmp_path / "cache").path
    data = bytearray(file.read_bytes())
    data[-4000:] = b"\xff" * 4000  # NaN: no weight is looked at
    file.write_bytes(data)
    one, two = planned(file), planned(unpacked)
    assert one.modules == two.modules and one.params == two.params == model.num_parameters()
    assert sum(phase.flops for phase in one.phases[1:]) == sum(phase.flops for phase in two.phases[1:])
    assert one.disk == pytest.approx(two.disk + file.stat().st_size, rel=0.02)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(DLRError, match="cannot be read as GGUF"):
        planned(file)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(DLRError, match=r"nor a \.gguf file"):
        planned(tmp_path / "model.bin")


def test_an_unknown_gpu_names_those_that_are_known(folder: Path) -> None:
    with pytest.raises(DLRError, match="h200"):
        plan_conversion(folder, device="h900")


@pytest.mark.parametrize("arch", ["mixtral", "deepseek_v3", "llama4_text", "t5", "bart"])
def test_mixtures_and_encoder_decoders_are_planned_as_they_are_converted(arch: str, tmp_path: Path) -> None:
    """The same modules, chains and parameters in the plan as in the conversion's report."""
    save_tiny(arch, tmp_path / "source")
    (tmp_path / "topics.txt").write_text(english_topics()[:40_000], encoding="utf-8")
    choices = CHOICES | {"expert_tokens": 64, "data": str(tmp_path / "topics.txt"), "device": "cpu"}
    plan = plan_conversion(tmp_path / "source", **choices)
    report = convert_model(tmp_path / "source", tmp_path / "out", **choices)
    assert [(m["module"], m["params"]) for m in plan.modules] == [
        (m.module, m.spec.params) for m in report.modules
    ]
    assert plan.mlps == report.mlps and plan.params == report.params_original
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    (writing,) = [p for p in plan.phases if p.name == "writing"]
    assert writing.moved - plan.phases[0].disk == pytest.approx(3 * written, rel=0.05)
    planned, spent = (
        sum(tokens)
        for tokens in ([m["train_tokens"] for m in plan.modules], [m.train_tokens for m in report.modules])
    )
    assert planned == pytest.approx(spent, rel=0.1)  # routers give one expert more than another


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sequence": ({"sequence": 512}, "--sequence 512: the model takes at most 256 tokens"),
    "tokens": ({"tokens": 16}, "16 calibration tokens are less than one sequence of 32"),
    "no file": ({"data": "nowhere.txt"}, "nowhere.txt: no such file"),
    "no text": ({"data": "picture.png"}, "cannot tell what kind of text"),
    "weights on demand": ({"end_to_end": 1024, "max_memory": 100_000}, "--end-to-end 0"),
    "layers": ({"layers": "9"}, "layer 9 is out of range"),
    "rank": ({"rank": 17}, "rank"),
    "too many of them": ({"layers": "auto:5"}, "layers 'auto:5': the model has MLPs in 4 layers"),
    "text to choose by": (
        {"layers": "auto:2", "tokens": 127},
        "--layers auto:2: --tokens must be at least 128 in whole sequences",
    ),
    "a choice on demand": ({"layers": "auto:2", "max_memory": 100_000}, "wants the whole model in memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_conversion_refuses_a_plan_refuses_in_the_same_words(
    name: str, folder: Path, tmp_path: Path
) -> None:
    Path("picture.png").touch()
    choices, words = REFUSED[name]
    said = []
    for refused in (plan_conversion, lambda source, **more: convert_model(source, tmp_path / "out", **more)):
        with pytest.raises(DLRError) as error:
            refused(folder, **({"data": "text.txt", "device": "cpu"} | CHOICES | choices))
        said.append(str(error.value))
    assert words in said[0] and said[0] == said[1]


@pytest.mark.parametrize(
    ("arch", "words"), [("t5", "writes nothing of its own accord"), ("bert", "no language-model")]
)
def test_a_model_that_cannot_write_is_given_no_plan_without_a_text(
    arch: str, words: str, tmp_path: Path
) -> None:
    save_tiny(arch, tmp_path / "source")
    for refused in (plan_conversion, lambda source, **more: convert_model(source, tmp_path / "out", **more)):
        with pytest.raises(DLRError, match=words):
            refused(tmp_path / "source", **CHOICES)


def test_modules_of_an_encoder_decoder_correct_nothing(tmp_path: Path) -> None:
    save_tiny("t5", tmp_path / "source")
    for refused in (plan_conversion, lambda source, **more: convert_model(source, tmp_path / "out", **more)):
        with pytest.raises(DLRError, match="cannot be distilled sequentially"):
            refused(tmp_path / "source", data="text.txt", across="sequential", **CHOICES)


def test_quantised_weights_are_planned_with_their_plain_copy(folder: Path, tmp_path: Path) -> None:
    """On a CPU the copy is in float32, whatever the files are in; on a GPU in bfloat16."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    numbers = sum(p.numel() for p in tiny_model("llama", layers=4).parameters())
    save_file({"w": torch.zeros(numbers, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    for device, itemsize in (("cpu", 4), ("h200", 2)):
        plan = plan_conversion(tmp_path, device=device, data="text.txt", **CHOICES)
        assert plan.phases[0].disk == size + itemsize * numbers
        (measuring,) = [p for p in plan.phases if p.name == "measuring"]
        assert measuring.disk - plan.phases[0].disk == pytest.approx(itemsize * numbers, rel=0.5)


def test_all_gpus_are_named_in_help_and_in_the_refusal(folder: Path) -> None:
    with pytest.raises(DLRError) as error:
        plan_conversion(folder, device="h900")
    help = CliRunner().invoke(app, ["plan", "--help"]).output
    assert all(name in str(error.value) and name in help for name in GPUS)


def test_layers_that_share_their_mlp_are_refused_as_by_a_conversion(tmp_path: Path) -> None:
    save_tiny("albert", tmp_path / "source")
    for refused in (plan_conversion, lambda source, **more: convert_model(source, tmp_path / "out", **more)):
        with pytest.raises(DLRError, match="whose layers share their MLP cannot be locked"):
            refused(tmp_path / "source", data="text.txt", **CHOICES)


def test_a_gpu_too_small_for_the_last_phase_is_no_matter_of_max_memory(tmp_path: Path) -> None:
    config = tiny_config(
        "llama", layers=40, hidden_size=8192, intermediate_size=28672, num_attention_heads=64, head_dim=128,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    save_file({"w": torch.zeros(8, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    with pytest.raises(DLRError, match="take a GPU with twice as much free, or leave the phase out"):
        plan_conversion(tmp_path, device="h100", data="text.txt", effort="best")
    assert plan_conversion(tmp_path, device="h100", data="text.txt", effort="best", end_to_end=0).modules
