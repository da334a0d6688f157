"""What a stranger meets with a checkpoint that is damaged, newer, or none at all."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from test_plugin import locked_tiny

from dlr_lock.common.errors import DLRError
from dlr_lock.common.files import MANIFEST
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
    (checkpoint / MANIFEST).write_text(json.dumps(manifest | {"format": 2}))
    for reader in (verify, load, inspect):
        with pytest.raises(DLRError, match="upgrade dlr-lock"):
            reader(checkpoint)
    (checkpoint / MANIFEST).unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["format"] = 2
    (checkpoint / "config.json").write_text(json.dumps(config))
    for reader in (load, inspect):
        with pytest.raises(DLRError, match="upgrade dlr-lock"):
            reader(checkpoint)


@pytest.mark.parametrize("text", ["{", "[]", "", '{"format": 1}', '{"format": 1, "files": {"a": 3}}'])
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
