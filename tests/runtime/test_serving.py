"""What `serve` says before an engine starts; the engines themselves are in tests/serving."""

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_plugin import locked_tiny

from dlr_lock.common.errors import DLRError
from dlr_lock.runtime.checkpoint import read_config, write_manifest
from dlr_lock.runtime.serving import _check_port, check_tensors, prepare_server


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    locked_tiny("llama").save_pretrained(tmp_path)
    write_manifest(tmp_path, {})
    return tmp_path


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def drop(file: Path) -> None:
    weights = load_file(file)
    del weights["model.layers.1.mlp.dlr_B"]
    save_file(weights, file)


def resize(file: Path) -> None:
    weights = load_file(file)
    weights["model.layers.1.mlp.dlr_scale"] = weights["model.layers.1.mlp.dlr_scale"][:-1].clone()
    save_file(weights, file)


def test_a_sound_checkpoint_has_all_tensors(checkpoint: Path) -> None:
    check_tensors(checkpoint, read_config(checkpoint))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "model.safetensors cannot be read"),
        (drop, "has no model.layers.1.mlp.dlr_B"),
        (resize, "model.layers.1.mlp.dlr_scale is [63], config.json says [64]"),
    ],
)
def test_damage_is_named_from_the_headers(
    damage: Callable[[Path], None], says: str, checkpoint: Path
) -> None:
    damage(checkpoint / "model.safetensors")
    with pytest.raises(DLRError, match=re.escape(says)):
        check_tensors(checkpoint, read_config(checkpoint))


def test_no_engine_and_an_unknown_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DLRError, match="unknown engine 'sglang'; one of vllm, transformers"):
        prepare_server(checkpoint, engine="sglang")
    monkeypatch.setattr("dlr_lock.runtime.serving.find_spec", lambda name: None)
    monkeypatch.setattr("dlr_lock.runtime.serving.is_serve_available", lambda: False)
    with pytest.raises(DLRError, match="no engine is installed"):
        prepare_server(checkpoint)
    with pytest.raises(DLRError, match="vLLM is not installed"):
        prepare_server(checkpoint, engine="vLLM")


def test_the_transformers_server_is_asked_as_the_user_asks(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlr_lock.runtime.serving.is_serve_available", lambda: True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = ["--host=127.0.0.1", f"--port={taken.getsockname()[1]}"]
        with pytest.raises(DLRError, match="Address already in use"):
            prepare_server(checkpoint, engine="transformers", flags=flags)
    server = prepare_server(checkpoint, engine="transformers", flags=flags)
    assert server.engine == "transformers" and server.command[-2:] == flags
    own = prepare_server(checkpoint, engine="transformers", flags=[*flags, "--cb-num-blocks=64"]).command
    assert "--cb-max-memory-percent" not in own
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    with pytest.raises(DLRError, match=r"is not what was written: config\.json"):
        prepare_server(checkpoint, engine="transformers", flags=flags)
    assert prepare_server(checkpoint, engine="transformers", flags=flags, hashes=False)


def test_another_model_among_the_flags_is_refused(checkpoint: Path) -> None:
    with pytest.raises(DLRError, match="would serve another model"):
        prepare_server(checkpoint, flags=["--model=another"])


@pytest.mark.parametrize("port", ["", "abc", "0", "65536", "-1"])
def test_a_port_that_is_none(port: str) -> None:
    with pytest.raises(DLRError, match=f"from 1 to 65535, not '{port}'"):
        _check_port(["--port", port], "localhost")
