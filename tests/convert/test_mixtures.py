"""Mixtures of experts converted: which are found, what each expert is fitted to, and what becomes of the starved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from locked import lock_randomly
from safetensors.torch import load_file, save_file
from tiny import MIXTURES, VOCABULARY, save_tiny, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dlr_lock import DLRError, DLRSpec, convert_model, load
from dlr_lock.convert.activations.calibrator import SequentialCalibrator
from dlr_lock.convert.activations.capture import capture
from dlr_lock.convert.data import english_topics
from dlr_lock.convert.experts.routing import Mixture, find_mixtures, router_of, teacher_of, together
from dlr_lock.convert.mlp_discovery import check_dense, find_mlps, select_layers
from dlr_lock.runtime import DLRExperts, ExpertsSpec, verify
from dlr_lock.runtime.experts import one_expert
from dlr_lock.runtime.quantizer import locked_experts
from dlr_lock.runtime.serving import checked_folder

QUICK: dict[str, Any] = {
    "tokens": 1536, "heldout": 512, "train_tokens": 2048, "batch": 128, "depth": 3, "rank": 16, "redistill": 0.0,
    "expert_tokens": 64,
}  # fmt: skip
GATED_ALIKE = ["mixtral", "deepseek_v3", "granitemoe", "llama4_text"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text(english_topics()[:40_000], encoding="utf-8")
    return path


def tokens(sequences: int = 4, n: int = 32) -> Tensor:
    return torch.randint(3, VOCABULARY, (sequences, n))


@pytest.mark.parametrize("arch", MIXTURES)
def test_found(arch: str) -> None:
    """Every mixture, and the dense MLPs before and beside them; layers by their numbers."""
    model = tiny_model(arch)
    mlps = find_mlps(model)
    mixtures = [mlp for mlp in mlps if isinstance(mlp, Mixture)]
    assert mixtures and all(mlp.experts == 4 and mlp.hidden_size == 64 for mlp in mixtures)
    dense = {"deepseek_v3": [0, 1], "llama4_text": [0, 1], "qwen2_moe": [0, 1]}.get(arch, [])
    assert [mlp.layer for mlp in mlps if not isinstance(mlp, Mixture)] == dense
    assert sum(mlp.params for mlp in mixtures) == sum(
        p.numel() for n, p in model.named_parameters() if ".experts." in n
    )
    assert {mlp.layer for mlp in select_layers(mlps, "last-1")} == {1}


@pytest.mark.parametrize("arch", GATED_ALIKE)
def test_an_experts_own_matrices(arch: str) -> None:
    module = tiny_model(arch).get_submodule(find_mixtures(tiny_model(arch))[0][0].module)
    x = torch.randn(5, 64)
    teacher = teacher_of(module, 2)
    assert teacher is not None and teacher.gate is not None
    with torch.no_grad():
        wanted = one_expert(module, 2, x)
    y = (nn.functional.silu(x @ teacher.gate.T) * (x @ teacher.up.T)) @ teacher.down.T
    assert torch.allclose(y, wanted, atol=1e-4)


def test_interleaved_halves() -> None:
    module = tiny_model("gpt_oss").model.layers[0].mlp.experts
    teacher = teacher_of(module, 1)
    assert teacher is not None and teacher.gate is not None
    assert torch.equal(teacher.gate, module.gate_up_proj[1].T[::2])
    assert torch.equal(teacher.up, module.gate_up_proj[1].T[1::2])


@pytest.mark.parametrize("arch", ["mixtral", "llama4_text"])
def test_activations_say_who_is_given_what(arch: str, tmp_path: Path) -> None:
    """From x and the routing alone the experts give the y that was seen."""
    model, ids = tiny_model(arch), tokens()
    mixture = find_mixtures(model)[0][0]
    ((_, pairs),) = [
        (m, p) for m, p in capture(model, [mixture], ids, max_memory=1 << 30, scratch=tmp_path, dtype=torch.float32)
        for y in [p.y.clone()]
        if torch.allclose(_given(model, mixture, p), y, atol=1e-4)
    ]  # fmt: skip
    assert pairs is not None


def _given(model: Any, mixture: Mixture, pairs: Any) -> Tensor:
    with torch.no_grad():
        return together(model.get_submodule(mixture.module), mixture.experts, pairs.x, pairs.routing)


def test_several_mlps_of_a_layer_correct_one_another(tmp_path: Path) -> None:
    """DeepSeek's shared expert is asked to make up for the routed experts' chains, which come first."""
    model, ids = tiny_model("deepseek_v3"), tokens()
    mlps = [mlp for mlp in find_mlps(model) if mlp.layer == 1]
    mixture, shared = mlps
    assert isinstance(mixture, Mixture) and "shared" in shared.module
    streams = SequentialCalibrator(model, mlps, ids, max_memory=1 << 30, scratch=tmp_path)
    streams.pairs(mixture)
    wrong = lock_randomly(tiny_model("deepseek_v3"))[mixture.module]
    assert streams.put(mixture, wrong) is None
    pairs = streams.pairs(shared)
    seen: dict[str, Tensor] = {}
    experts = model.get_submodule(mixture.module)
    hook = experts.register_forward_hook(lambda m, a, y: seen.update(x=a, y=y))
    own: list[Tensor] = []
    other = model.get_submodule(shared.module).register_forward_hook(lambda m, a, y: own.append(y))
    with torch.no_grad():
        model(input_ids=ids)
        hook.remove()
        other.remove()
        missing = seen["y"] - wrong(*seen["x"])
    assert torch.allclose(pairs.y.float(), own[0].flatten(0, 1) + missing, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("arch", MIXTURES)
def test_conversion(arch: str, text: Path, tmp_path: Path) -> None:
    """What is not locked is the original's, bit for bit, and what is loaded is saved and loaded again as it is."""
    source = save_tiny(arch, tmp_path / "source")
    report = convert_model(source, tmp_path / "out", data=str(text), **QUICK)
    found = find_mlps(tiny_model(arch))
    assert [m.module for m in report.modules] == [mlp.module for mlp in found] and report.mlps == len(found)
    assert report.across == "sequential" and verify(tmp_path / "out") == []
    locked = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(locked_experts(locked)) == sum(isinstance(mlp, Mixture) for mlp in found)
    for module in report.modules:
        assert 0 < module.fidelity.rel_error < 1 and module.fidelity.flatten_gap > 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "4 of 1x3x16 silu" in card
    original, ids = AutoModelForCausalLM.from_pretrained(source), tokens()
    replaced = tuple(f"{mlp.module}." for mlp in found)
    kept = {n: p for n, p in original.named_parameters() if not n.startswith(replaced)}
    assert len(kept) > 10 and all(torch.equal(p, locked.get_parameter(n)) for n, p in kept.items())
    locked.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        wanted, got = (m(ids).logits for m in (locked, load(tmp_path / "again", device="cpu")))
    assert torch.equal(got, wanted) and wanted.isfinite().all()


def test_starved_experts_are_named_and_fitted_on_the_nearest_tokens(text: Path, tmp_path: Path) -> None:
    source = save_tiny("mixtral", tmp_path / "source", num_experts_per_tok=1)
    choices = QUICK | {"layers": "0", "expert_tokens": 1024}
    report = convert_model(source, tmp_path / "out", data=str(text), **choices)
    (note,) = [n for n in report.warnings if "got fewer than 1,024 tokens" in n]
    assert "were fitted on those their router scores highest for, too" in note
    spec = report.modules[0].spec
    assert not spec.kept and "4 of 1x3x16" in str(spec)


def test_starved_experts_may_be_left_as_they_are(text: Path, tmp_path: Path) -> None:
    source = save_tiny("mixtral", tmp_path / "source", num_experts_per_tok=1)
    original = AutoModelForCausalLM.from_pretrained(source)
    mixture = find_mixtures(original)[0][0]
    with torch.no_grad():  # the router never sends a token to the last expert
        router_of(original, mixture)[3] = 0
        original.model.layers[0].mlp.gate.weight[3] = -original.model.layers[0].mlp.gate.weight[:3].sum(0) * 5
    original.save_pretrained(source)
    choices = QUICK | {"layers": "0", "expert_tokens": 256, "starved": "leave"}
    report = convert_model(source, tmp_path / "out", data=str(text), **choices)
    kept = report.modules[0].spec.kept
    assert kept and any("stay as they are, as trainable as before" in n for n in report.warnings)
    locked = load(tmp_path / "out", device="cpu")
    ((name, chains),) = locked_experts(locked)
    x = torch.randn(4, 64)
    stock = original.get_submodule(name)
    with torch.no_grad():
        index = torch.full((4, 1), kept[0])
        assert torch.allclose(chains(x, index, torch.ones(4, 1)), one_expert(stock, kept[0], x), atol=1e-6)


def test_what_no_expert_is_locked_in_is_refused(text: Path, tmp_path: Path) -> None:
    source = save_tiny("mixtral", tmp_path / "source")
    with pytest.raises(DLRError, match=r"no expert of .* gets .* tokens: give more text"):
        convert_model(
            source, tmp_path / "out", data=str(text), **QUICK | {"starved": "leave", "expert_tokens": 9999}
        )
    with pytest.raises(DLRError, match="experts get one lane each: leave --lanes out"):
        convert_model(source, tmp_path / "out2", data=str(text), **QUICK | {"lanes": 2})


def test_the_attack_is_on_the_expert_of_the_smallest_gap(text: Path, tmp_path: Path) -> None:
    source = save_tiny("mixtral", tmp_path / "source")
    report = convert_model(
        source, tmp_path / "out", data=str(text), **QUICK | {"layers": "1", "redistill": 0.5}
    )
    (module,) = report.modules
    assert module.redistillation is not None and module.redistillation.train_tokens > 0
    assert any("whose flatten gap is the smallest" in note for note in report.warnings)


def test_end_to_end_goes_through_experts_and_trains_the_rest(text: Path, tmp_path: Path) -> None:
    source = save_tiny("deepseek_v3", tmp_path / "source")
    report = convert_model(source, tmp_path / "out", data=str(text), **QUICK | {"end_to_end": 1024})
    dropped = [note for note in report.warnings if "end-to-end phase was dropped" in note]
    assert report.end_to_end is not None or dropped
    only = save_tiny("mixtral", tmp_path / "only")
    report = convert_model(
        only, tmp_path / "out2", data=str(text), **QUICK | {"end_to_end": 1024, "layers": "0"}
    )
    assert report.end_to_end is None and any("trains no experts' chains" in note for note in report.warnings)


def test_llama_4_with_several_experts_a_token_is_told(text: Path, tmp_path: Path) -> None:
    source = save_tiny("llama4_text", tmp_path / "source", num_experts_per_tok=2)
    with pytest.raises(DLRError, match="gives a token to several experts, scaled for each"):
        convert_model(source, tmp_path / "out", data=str(text), **QUICK)


def test_unknown_mixtures_are_named() -> None:
    """What is called in another way is found to be so by running it, and no lock of the model."""
    model = tiny_model("deepseek_v3")
    experts = model.model.layers[1].mlp.experts
    stock = experts.forward
    experts.forward = lambda x, index, weight: stock(x, index, weight.square())
    mlps = find_mlps(model)
    assert not any(isinstance(mlp, Mixture) for mlp in mlps) and [mlp.layer for mlp in mlps] == [0, 1]
    with pytest.raises(DLRError, match=r"1 of the model's 3 MLPs .* \(DeepseekV3MoE\).*--layers 0-1"):
        check_dense(model, mlps, layers=None, pattern=None)
    assert "not locked" in str(check_dense(model, mlps, layers="0", pattern=None))


def test_a_checkpoint_whose_tensors_are_saved_under_other_names_is_whole(text: Path, tmp_path: Path) -> None:
    """transformers saves Mixtral's modules as block_sparse_moe."""
    save_tiny("mixtral", tmp_path / "source")
    convert_model(tmp_path / "source", tmp_path / "out", data=str(text), **QUICK)
    assert checked_folder(tmp_path / "out") == tmp_path / "out"
    weights = tmp_path / "out" / "model.safetensors"
    tensors = load_file(weights)
    del tensors[next(name for name in tensors if name.endswith("dlr_B"))]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(DLRError, match=r"dlr_B: it is incomplete"):
        checked_folder(tmp_path / "out", hashes=False)


def test_kept_experts_have_the_checkpoints_dtype() -> None:
    model = tiny_model("mixtral")
    mixture = next(mlp for mlp in find_mlps(model) if isinstance(mlp, Mixture))
    stock = model.get_submodule(mixture.module)
    spec = ExpertsSpec(DLRSpec(64, 1, 3, 16), mixture.experts, tuple(range(mixture.experts - 1)))
    kept = DLRExperts(spec, stock, dtype=torch.bfloat16).dlr_kept
    assert kept is not None and {p.dtype for p in kept.parameters()} == {torch.bfloat16}
