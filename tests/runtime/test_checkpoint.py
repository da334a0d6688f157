"""What a stranger meets with a checkpoint that is damaged, newer, or none at all."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from locked import locked_tiny
from test_plugin import logits
from tiny import as_hub_copy, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dlr_lock.common.errors import DLRError
from dlr_lock.common.files import MANIFEST
from dlr_lock.convert import complete
from dlr_lock.runtime import inspect, load, verify
from dlr_lock.runtime.checkpoint import write_manifest


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "locked"
    locked_tiny("llama").save_pretrained(folder)
    write_manifest(folder, {})
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rename(path: Path) -> None:
    path.rename(path.with_name("renamed.safetensors"))


def test_a_sound_checkpoint_has_no_faults(checkpoint: Path) -> None:
    assert verify(checkpoint) == []


@pytest.mark.parametrize(
    ("damage", "says"), [(truncate, "bytes, the manifest says"), (flip_a_bit, "altered"), (rename, "missing")]
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_verify_names_the_bad_file(
    damage: Callable[[Path], None], says: str, name: str, checkpoint: Path
) -> None:
    damage(checkpoint / name)
    faults = verify(checkpoint)
    assert any(fault.startswith(f"{name}: ") and says in fault for fault in faults)


def test_verify_names_a_weight_file_that_was_slipped_in(checkpoint: Path) -> None:
    (checkpoint / "extra.safetensors").write_bytes(b"x")
    assert verify(checkpoint) == ["extra.safetensors: not in the manifest"]


@pytest.mark.parametrize("damage", [truncate, rename])
def test_load_names_the_bad_file(damage: Callable[[Path], None], checkpoint: Path) -> None:
    damage(checkpoint / "model.safetensors")
    with pytest.raises(DLRError, match=r"model\.safetensors"):
        load(checkpoint)


def test_load_without_a_manifest_says_what_is_wrong_too(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    load(checkpoint)
    truncate(checkpoint / "model.safetensors")
    with pytest.raises(DLRError, match="does not load"):
        load(checkpoint)


def test_newer_formats_are_refused(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps(manifest | {"format": 3}))
    for reader in (verify, load, inspect):
        with pytest.raises(DLRError, match="upgrade dlr-lock"):
            reader(checkpoint)
    (checkpoint / MANIFEST).unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["format"] = 3
    (checkpoint / "config.json").write_text(json.dumps(config))
    for reader in (load, inspect):
        with pytest.raises(DLRError, match="upgrade dlr-lock"):
            reader(checkpoint)


@pytest.mark.parametrize(
    "text", ["{", "[]", "", '{"format": 1}', '{"format": 1, "files": {"a": 3}}', '{"format": 1, "files": {}}']
)
def test_a_damaged_manifest_is_named(text: str, checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text(text)
    for reader in (verify, load, inspect):
        with pytest.raises(DLRError, match=MANIFEST):
            reader(checkpoint)


def test_a_manifest_cannot_point_outside(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"]["../secret"] = {"size": 1, "sha256": "0"}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DLRError, match=r"\.\./secret"):
        verify(checkpoint)


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    for reader in (load, inspect):
        with pytest.raises(DLRError, match="not a directory"):
            reader(tmp_path / "nowhere")
        with pytest.raises(DLRError, match=r"no config\.json"):
            reader(tmp_path)
    with pytest.raises(DLRError, match=MANIFEST):
        verify(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DLRError, match="not a locked checkpoint"):
        load(tmp_path)


def test_inspect_lists_the_chains(checkpoint: Path) -> None:
    facts = inspect(checkpoint)
    assert set(facts["lock"]["modules"]) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert facts["lock"]["modules"]["model.layers.0.mlp"]["depth"] == 3
    assert "model.safetensors" in facts["files"]


def test_what_is_beside_weights_and_config_may_be_edited_and_verify_names_it(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("Ours.")
    (checkpoint / "1_Pooling").mkdir()
    (checkpoint / "1_Pooling" / "config.json").write_text("{}")
    write_manifest(checkpoint, {})
    (checkpoint / "README.md").write_text("Ours, in more words.")
    (checkpoint / "1_Pooling" / "config.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.generation_config.max_new_tokens = 5
    model.generation_config.save_pretrained(checkpoint)
    assert torch.equal(logits(load(checkpoint)), logits(model))
    assert sorted(fault.split(":")[0] for fault in verify(checkpoint)) == [
        "1_Pooling/config.json", "README.md", "generation_config.json"
    ]  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_name_on_the_hub_is_as_good_as_a_folder(checkpoint: Path, hub: Path) -> None:
    tiny_tokenizer().save_pretrained(checkpoint)
    write_manifest(checkpoint, {"made": "by hand"})
    as_hub_copy(checkpoint, "owner/locked", hub)
    assert torch.equal(logits(load("owner/locked")), logits(load(checkpoint)))
    assert inspect("owner/locked")["made"] == "by hand" and verify("owner/locked") == []
    assert complete("owner/locked", "The sea", max_new_tokens=4) == complete(
        checkpoint, "The sea", max_new_tokens=4
    )
    for reader in (load, inspect, verify):
        with pytest.raises(DLRError, match="Hugging Face hub"):
            reader("owner/other")


def test_a_file_that_may_not_be_read_is_said_to_be_just_that(nobodys: Path) -> None:
    locked_tiny("llama").save_pretrained(nobodys / "locked")
    tiny_tokenizer().save_pretrained(nobodys / "locked")
    write_manifest(nobodys / "locked", {})

    def say(path: Path) -> str:
        return complete(path, "The sea")

    for path, readers in (
        ("locked/model.safetensors", (load, verify, say)),
        ("locked/tokenizer.json", (verify, say)),
        ("locked/config.json", (load, inspect, verify, say)),
        ("locked/dlr_manifest.json", (load, inspect, verify, say)),
        ("locked", (load, inspect, verify, say)),
        ("", (load, inspect, verify, say)),
    ):
        mode = (nobodys / path).stat().st_mode
        (nobodys / path).chmod(0)
        for reader in readers:
            with pytest.raises(DLRError, match=r"permission denied; change its permissions or ask its owner"):
                reader(nobodys / "locked")
        (nobodys / path).chmod(mode)
