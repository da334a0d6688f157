"""Adapters as sources: merged as PEFT merges them, or a line that says how."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from dlr_lock import DLRError, convert_model
from dlr_lock.convert.source import open_source
from dlr_lock.planning.plan import plan_conversion

CONFIG = "adapter_config.json"
with_peft = pytest.mark.skipif(find_spec("peft") is None, reason="the package peft merges adapters")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLR_LOCK_CACHE", str(tmp_path / "cache"))


def adapter_of(base: Path, folder: Path, **config: Any) -> Path:
    """An adapter as PEFT saves it, with a B that is not zero."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(base)
    choices = {"target_modules": ["q_proj", "down_proj"], "r": 4, "task_type": "CAUSAL_LM"} | config
    adapted = peft.get_peft_model(model, peft.LoraConfig(**choices))
    for weight in adapted.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(folder)
    return folder


def refused(folder: Path, act: Any = open_source, **options: Any) -> str:
    with pytest.raises(DLRError) as error:
        act(folder, **options)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


OPEN: dict[str, Any] = {"dtype": "auto", "device": "cpu"}


@with_peft
@pytest.mark.parametrize(
    ("dtype", "choices"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"use_dora": True}),
        (torch.float32, {"modules_to_save": ["lm_head"]}),
    ],
)
def test_an_adapter_is_merged_as_peft_does_it(
    dtype: torch.dtype, choices: dict[str, Any], tmp_path: Path
) -> None:
    import peft

    base = save_tiny("llama", tmp_path / "base", dtype=dtype)
    folder = adapter_of(base, tmp_path / "adapter", **choices)
    source = open_source(folder, **OPEN)
    wanted = (
        peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype="auto").merge_and_unload().state_dict()
    )
    got, plain = source.model.state_dict(), AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in got)
    assert not all(torch.equal(got[name], plain[name].to(dtype)) for name in got)
    assert source.model.dtype == dtype and source.tokenizer is not None and source.name == str(folder)
    assert type(source.model).__name__ == "LlamaForCausalLM"
    again = open_source(folder, **OPEN)
    assert again.fingerprint == source.fingerprint and again.path == source.path
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: 2 * w for name, w in weights.items()}, folder / "adapter_model.safetensors")
    other = open_source(folder, **OPEN)
    assert other.fingerprint != source.fingerprint and other.path != source.path


@with_peft
def test_an_adapter_is_converted_and_planned_like_its_merged_model(tmp_path: Path) -> None:
    import peft

    base = save_tiny("llama", tmp_path / "base", layers=2)
    folder = adapter_of(base, tmp_path / "adapter")
    peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(
        tmp_path / "merged"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "merged" / name).write_bytes((base / name).read_bytes())
    text = tmp_path / "text.txt"
    text.write_text("The river runs past the mill and the town. " * 400, encoding="utf-8")
    options: dict[str, Any] = {
        "data": str(text), "tokens": 1024, "heldout": 512, "train_tokens": 1024, "batch": 256, "effort": "quick",
    }  # fmt: skip
    for name in ("adapter", "merged"):
        convert_model(tmp_path / name, tmp_path / f"{name}-locked", **options)
    one, two = (
        load_file(tmp_path / f"{name}-locked" / "model.safetensors") for name in ("adapter", "merged")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    plans = [plan_conversion(tmp_path / name, device="h200", **options) for name in ("adapter", "merged")]
    assert plans[0].modules == plans[1].modules and plans[0].flops == plans[1].flops
    size = sum(w.numel() * 4 for w in AutoModelForCausalLM.from_pretrained(base).parameters())
    assert plans[0].disk == pytest.approx(plans[1].disk + size, rel=0.02)


@with_peft
def test_what_peft_cannot_merge_ends_in_a_line(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    folder = adapter_of(base, tmp_path / "adapter")
    good = json.loads((folder / CONFIG).read_text())

    def with_config(**changes: Any) -> str:
        (folder / CONFIG).write_text(json.dumps(good | changes))
        said = refused(folder, **OPEN)
        (folder / CONFIG).write_text(json.dumps(good))
        return said

    for missing in (str(tmp_path / "nowhere" / "x" / "y"), "no/such/name/here"):
        said = with_config(base_model_name_or_path=missing)
        assert "its base model is missing" in said and missing in said and "base_model_name_or_path" in said
    assert "does not say of which model" in with_config(base_model_name_or_path=None)
    assert "an adapter itself" in with_config(base_model_name_or_path=str(folder))
    assert "cannot merge" in with_config(target_modules=["nothing_of_that_name"])
    assert "cannot merge" in with_config(peft_type="NEW")
    other = save_tiny("llama", tmp_path / "other", hidden_size=32, head_dim=8)
    assert "cannot merge" in with_config(base_model_name_or_path=str(other))
    # Fewer weights than the config speaks of, and more: PEFT would fill the former at random, and drop the latter.
    assert "missing adapter keys" in with_config(target_modules=["q_proj", "down_proj", "up_proj"])
    assert "has no place for" in with_config(target_modules=["q_proj"])
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "a pickle is never opened" in refused(folder, **OPEN)


@pytest.mark.skipif(find_spec("peft") is not None, reason="peft is here")
def test_without_peft_a_line_says_what_merges_it(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG).write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')
    for said in (refused(folder, **OPEN), refused(folder, plan_conversion, data="text.txt")):
        assert "an adapter of owner/base" in said and "pip install 'dlr-lock[peft]'" in said
