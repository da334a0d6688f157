"""Locked checkpoints through plain transformers: exact round trips, and loud failures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from locked import lock_randomly, locked_tiny
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers import auto

from dlr_lock import backend
from dlr_lock.common.errors import DLRError
from dlr_lock.runtime import DLRSpec, load, locked_modules, quantizer
from dlr_lock.runtime.quantizer import register

ARCHITECTURES = ["llama", "qwen3", "gemma2", "mistral", "phi", "gpt2", "gpt_neox", "opt", "helium", "bloom"]


def test_gated_chains_load_and_are_not_saved(tmp_path: Path) -> None:
    """A checkpoint of them from before stays usable; a new one is refused with the reason."""
    with pytest.raises(DLRError, match="gated steps, which is not saved"):
        lock_randomly(tiny_model("llama"), gated=True)
    model = locked_tiny("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    state = load_file(tmp_path / "model.safetensors")
    for name, spec in config["quantization_config"]["modules"].items():
        spec["gated"] = True
        state[f"{name}.dlr_G"] = torch.randn_like(state[f"{name}.dlr_A"]) / 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load(tmp_path)
    assert not torch.allclose(logits(loaded), logits(model))
    with pytest.raises(DLRError, match="gated steps, which is not saved"):
        loaded.save_pretrained(tmp_path / "again")


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.arange(24).view(2, 12) + 3
    return model(input_ids=tokens).logits


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_round_trip_is_exact(arch: str, tmp_path: Path) -> None:
    model = locked_tiny(arch)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert len(locked_modules(loaded)) == 2
    assert torch.equal(logits(loaded), wanted)
    loaded.save_pretrained(tmp_path / "two", max_shard_size="40KB")  # saved again, in shards
    assert len(list((tmp_path / "two").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "two")), wanted)


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_bfloat16_round_trip_keeps_scales_in_float32(arch: str, tmp_path: Path) -> None:
    save_tiny(arch, tmp_path / "original", tokenizer=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.bfloat16)
    chains = lock_randomly(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "locked")
    for dtype in ("auto", torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "locked", dtype=dtype)
        name, net = locked_modules(loaded)[0]
        assert net.dlr_A.dtype == torch.bfloat16 and net.dlr_scale.dtype == torch.float32
        assert torch.equal(net.dlr_scale, chains[name].dlr_scale)
        assert torch.equal(logits(loaded), wanted)


def test_the_bare_body_loads_too(tmp_path: Path) -> None:
    model = locked_tiny("llama")
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(body(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


@torch.no_grad()
def states(model: PreTrainedModel) -> torch.Tensor:
    return model.base_model(input_ids=torch.arange(24).view(2, 12) + 3).last_hidden_state


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2", "phi3", "bert"])
def test_a_body_loads_into_classes_with_a_head_and_back(arch: str, tmp_path: Path) -> None:
    """Names gain and lose the body's prefix, saved at every station and read there again."""
    body = AutoModel.from_config(tiny_model(arch).config).eval()
    lock_randomly(body)
    wanted = states(body)
    body.save_pretrained(tmp_path / "body")
    here = tmp_path / "body"
    headed = AutoModelForMaskedLM if arch == "bert" else AutoModelForCausalLM
    for number, family in enumerate((AutoModelForSequenceClassification, AutoModel, headed, AutoModel)):
        model = family.from_pretrained(here)
        assert len(locked_modules(model)) == 2 and torch.equal(states(model), wanted)
        here = tmp_path / str(number)
        model.save_pretrained(here)
        assert torch.equal(states(load(here)), wanted)
        named = json.loads((here / "config.json").read_text())["quantization_config"]["modules"]
        assert list(named) == [name for name, _ in locked_modules(model)]
        for loader in (AutoModelForSequenceClassification, AutoModel):  # the tripwires came along
            assert torch.equal(states(loader.from_pretrained(here)), wanted)
        assert sum(name.endswith("dlr_A") for name in load_file(here / "model.safetensors")) == 2


@pytest.mark.parametrize("arch", ["llama", "bert", "masked"])
def test_a_new_head_learns_and_nothing_else_does(arch: str, tmp_path: Path) -> None:
    model = tiny_model("bert" if arch == "masked" else arch)
    if arch == "masked":
        model = BertForMaskedLM(model.config).eval()  # has no pooler, which a classifier's body wants
    lock_randomly(model)
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    before = {name: parameter.clone() for name, parameter in classifier.named_parameters()}
    head = {name: parameter for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in head} == {
        "masked": {"bert", "classifier"},
        "bert": {"classifier"},
    }.get(arch, {"score"})
    optimizer = torch.optim.AdamW(head.values(), lr=0.02)
    ids, labels = torch.arange(24).view(4, 6) + 3, torch.tensor([0, 1, 2, 0])
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = classifier(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    moved = {n for n, parameter in classifier.named_parameters() if not torch.equal(parameter, before[n])}
    assert moved == set(head)


def test_nothing_asks_for_a_gradient_and_trainer_refuses(tmp_path: Path) -> None:
    locked_tiny("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(p.requires_grad for p in model.parameters())
    arguments = TrainingArguments(output_dir=str(tmp_path / "runs"), report_to=[])
    with pytest.raises(DLRError, match=r"with dlr_lock.backend\('naive'\)"):
        Trainer(model, arguments)
    with backend("naive"), pytest.raises(DLRError, match=r"requires_grad_\(True\)"):
        Trainer(model, arguments)


def train(model: nn.Module, folder: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        max_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        save_strategy="no",
    )
    with backend("naive"):
        Trainer(model, arguments, train_dataset=rows).train()


def test_a_trainer_trains_on_purpose(tmp_path: Path) -> None:
    locked_tiny("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).requires_grad_(True)
    before = [net.dlr_A.detach().clone() for _, net in locked_modules(model)]
    train(model, tmp_path / "runs")
    assert not any(
        torch.equal(a, net.dlr_A) for a, (_, net) in zip(before, locked_modules(model), strict=True)
    )
    with torch.no_grad():  # and runs by the fast form afterwards
        fast = model(torch.tensor([[5, 6, 7]])).logits
        with backend("naive"):
            torch.testing.assert_close(fast, model(torch.tensor([[5, 6, 7]])).logits)


def test_adapters_are_trained_and_chains_are_said_to_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    locked_tiny("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    said: list[str] = []
    monkeypatch.setattr(quantizer.logger, "warning_once", said.append)
    train(adapted, tmp_path / "runs")
    assert len(said) == 1 and "chains of this locked model stay as they are" in said[0]
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name and "mlp" not in name for name in trained)
    assert any(p.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)
    now = dict(model.named_parameters())
    assert all(torch.equal(value, now.get(name, value)) for name, value in before.items())


def test_adapters_on_a_chain_are_refused_with_the_reason_and_whole_chains_may_be_trained(
    tmp_path: Path,
) -> None:
    peft = pytest.importorskip("peft")
    locked_tiny("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no linear layer is in it, and adapters fit linear layers alone"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["mlp"], task_type="CAUSAL_LM"))
    whole = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), whole)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    train(adapted, tmp_path / "runs")
    now = dict(adapted.named_parameters())
    assert [name for name, p in before.items() if name.endswith("dlr_A") and not torch.equal(p, now[name])]


def test_generation_and_compilation_need_nothing_special(tmp_path: Path) -> None:
    locked_tiny("llama").save_pretrained(tmp_path)
    model = load(tmp_path)
    prompt = torch.tensor([[5, 6, 7]])
    tokens = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=2)
    greedy = prompt
    for _ in range(tokens.shape[1] - 3):
        with torch.no_grad():
            greedy = torch.cat([greedy, model(greedy).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens, greedy)


def test_without_dlr_lock_transformers_fails_loudly(tmp_path: Path) -> None:
    locked_tiny("llama").save_pretrained(tmp_path)
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path)!r})"
    absent = {**os.environ, "DLR_LOCK_AUTOLOAD": "0"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=absent)
    assert result.returncode != 0
    assert "mismatch" in result.stderr.lower() and "mlp" in result.stderr
    assert "this_model_needs.pip_install_dlr-lock" in result.stderr


def test_a_method_of_the_name_by_another_package_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    register()  # a second time changes nothing
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "dlr", dict)
    with pytest.raises(DLRError, match="another package has registered a method 'dlr'"):
        register()
    assert auto.AUTO_QUANTIZER_MAPPING["dlr"] is dict


def test_with_the_import_alone_it_loads(tmp_path: Path) -> None:
    locked_tiny("llama").save_pretrained(tmp_path)
    code = (
        "import dlr_lock; from transformers import AutoModelForCausalLM as A;"
        f"print(type(A.from_pretrained({str(tmp_path)!r}).model.layers[1].mlp).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "DLRNet", result.stderr


@pytest.mark.parametrize(
    "tensor", ["model.layers.1.mlp.dlr_B", "model.layers.0.self_attn.q_proj.weight"], ids=["chain", "stock"]
)
def test_a_missing_tensor_is_named(tensor: str, tmp_path: Path) -> None:
    locked_tiny("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[tensor]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DLRError, match=re.escape(tensor)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 99}, "format 99"),
        ({"modules": {}}, "no modules"),
        ({"colour": "red"}, "colour"),
        ({"modules": {"model.layers.7.mlp": DLRSpec(64, 1, 3, 16).to_dict()}}, r"layers\.7"),
    ],
)
def test_a_strange_description_is_refused(change: dict, says: str, tmp_path: Path) -> None:
    locked_tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DLRError, match=says):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_unlocked_model_cannot_be_asked_to_be_locked_on_loading(tmp_path: Path) -> None:
    from dlr_lock.runtime import DLRConfig

    save_tiny("llama", tmp_path, tokenizer=False)
    wish = DLRConfig({"model.layers.0.mlp": DLRSpec(64, 1, 3, 16)})
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=wish)
