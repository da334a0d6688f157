"""Opening source models: what loads, and one line of plain words for everything that does not."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model, tiny_tokenizer, write_gguf

from dlr_lock.common.errors import DLRError
from dlr_lock.common.memory import memory_bytes
from dlr_lock.common.side_files import licence
from dlr_lock.convert.source import open_source, weight_files

IDS = torch.randint(320, (1, 10), generator=torch.Generator().manual_seed(5))


def opened(source, dtype=torch.float32, **options):
    return open_source(source, dtype=dtype, device="cpu", **options)


def output(model):
    with torch.no_grad():
        return model(input_ids=IDS)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("saved") / "llama")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a good model, to be spoilt."""
    return shutil.copytree(saved, tmp_path / "model")


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_weights(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def refused(source, **options):
    """The message open_source refuses with; one line, naming the source."""
    with pytest.raises(DLRError) as error:
        opened(source, **options)
    message = str(error.value)
    assert "\n" not in message and str(source).rsplit("/", 1)[-1] in message
    return message


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_loads_a_directory(arch, tmp_path, capfd):
    folder = save_tiny(arch, tmp_path / arch)
    capfd.readouterr()
    source = opened(str(folder))
    assert torch.equal(output(source.model), output(tiny_model(arch)))
    assert type(source.model) is type(tiny_model(arch))
    assert not source.model.training and not any(p.requires_grad for p in source.model.parameters())
    assert source.tokenizer("The sea").input_ids == tiny_tokenizer()("The sea").input_ids
    assert (source.name, source.path) == (str(folder), folder)
    assert capfd.readouterr() == ("", "")


def test_dtype_leaves_the_rotary_table_alone(saved):
    model = opened(saved, torch.bfloat16).model
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert opened(saved, "auto").model.dtype == torch.float32


def test_shards_and_no_tokenizer(tmp_path):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    source = opened(tmp_path)
    assert source.tokenizer is None
    assert torch.equal(output(source.model), output(model))
    shard = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    shard.unlink()
    assert f"{shard} is missing" in refused(tmp_path)


def test_tied_weights_are_not_missing(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(output(opened(tmp_path).model), output(model))


def test_fingerprint(folder, saved):
    first = opened(saved).fingerprint
    assert len(first) == 64 and opened(folder).fingerprint == first  # wherever it lies
    (folder / "README.md").write_text("A model.")
    assert opened(folder).fingerprint == first
    edit_weights(folder, lambda tensors: tensors["model.norm.weight"][3].add_(1e-3))
    second = opened(folder).fingerprint
    edit_config(folder, rms_norm_eps=1e-7)
    assert len({first, second, opened(folder).fingerprint}) == 3


def test_missing_and_empty(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert "check the path" in refused(tmp_path / "nowhere")
    assert "Hugging Face hub" in refused("nobody/no-model")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is empty" in refused(empty)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    assert "neither a model's directory nor a .gguf file" in refused(text)


def test_config(folder):
    good = (folder / "config.json").read_text()
    edit_config(folder, model_type="unheard-of")
    assert "model_type 'unheard-of' is unknown" in refused(folder)
    edit_config(folder, auto_map={"AutoModelForCausalLM": "code.Model"})
    assert "code of its own, which is never run" in refused(folder)
    (folder / "config.json").write_text(good[:-20])
    assert "cannot be read as JSON" in refuse_in(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as JSON" in refuse_in(folder)
    (folder / "config.json").write_text("[1]")
    assert "not a JSON object" in refuse_in(folder)
    (folder / "config.json").write_text(good)
    edit_config(folder, hidden_size="wide")
    assert "cannot be loaded" in refused(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(folder)


def test_an_adapter_beside_a_model_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')
    assert "holds an adapter (adapter_config.json) beside a model: merge it" in refused(folder)


def test_what_may_not_be_read_is_neither_missing_nor_damaged(nobodys):
    folder = save_tiny("llama", nobodys / "model")
    for path in ("model.safetensors", "config.json", "tokenizer.json", ""):
        mode = (folder / path).stat().st_mode
        (folder / path).chmod(0)
        assert "permission denied; change its permissions or ask its owner" in refuse_in(folder)
        (folder / path).chmod(mode)


def refuse_in(folder):
    """As `refused`, where the message names a file of the folder."""
    with pytest.raises(DLRError) as error:
        opened(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


def test_locked_and_quantised(folder):
    edit_config(folder, quantization_config={"quant_method": "dlr", "format": 1})
    assert "is already locked" in refused(folder)
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "is quantised (gptq), which is not undone here" in refused(folder)


def test_damaged_weights(folder):
    file = folder / "model.safetensors"
    good = file.read_bytes()
    for part in (good[:-1000], good[:100], b""):
        file.write_bytes(part)
        assert "model.safetensors is truncated or damaged" in refuse_in(folder)
    file.unlink()
    assert "has no weights" in refused(folder)
    torch.save({}, folder / "pytorch_model.bin")
    assert "pickle" in refused(folder) and "convert it to safetensors" in refused(folder)


def test_lost_and_misshapen_weights(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    assert f"wrong shape for {name}" in refused(folder)
    edit_weights(folder, lambda tensors: tensors.pop(name))
    assert f"lacks {name}" in refused(folder)
    edit_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))
    assert "and 1 more" in refused(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder, value):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors[name][5, 7].fill_(value))
    assert f"{name} has NaN or infinity" in refused(folder)


def test_weights_beyond_float16(folder):
    edit_weights(folder, lambda tensors: tensors["lm_head.weight"][5, 7].fill_(1e6))
    opened(folder, torch.bfloat16)
    assert "lm_head.weight has NaN or infinity in its weights (as float16)" in refused(
        folder, dtype=torch.float16
    )


def test_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DLRError, match=r"the tokenizer in .* cannot be loaded"):
        opened(folder)


def test_gguf(tmp_path, capfd):
    pytest.importorskip("gguf", reason="the [gguf] extra is not installed")
    pytest.importorskip("accelerate", reason="the [gguf] extra is not installed")
    model = tiny_model("llama", rms_norm_eps=1e-5)
    file = write_gguf(model, tmp_path / "tiny.gguf")
    capfd.readouterr()
    source = opened(file, gguf_dir=tmp_path / "cache")
    assert capfd.readouterr().err == ""
    torch.testing.assert_close(output(source.model), output(model), rtol=1e-4, atol=1e-4)
    assert source.tokenizer("The sea, 漢").input_ids == tiny_tokenizer()("The sea, 漢").input_ids
    assert licence(source.path) == {"license": "mit"}
    # What was unpacked is an ordinary directory, alone in the cache folder, and is used again.
    assert list((tmp_path / "cache").iterdir()) == [source.path]
    assert torch.equal(output(opened(source.path).model), output(source.model))
    stamp = (source.path / "model.safetensors").stat().st_mtime_ns
    again = opened(file, gguf_dir=tmp_path / "cache")
    assert (again.path, again.fingerprint) == (source.path, source.fingerprint)
    assert (again.path / "model.safetensors").stat().st_mtime_ns == stamp

    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:5000])
    assert "cannot be read as GGUF" in refused(cut, gguf_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [source.path]


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_gguf_without_its_packages(package, tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    assert "pip install 'dlr-lock[gguf]'" in refused(file, gguf_dir=tmp_path)


def as_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The matrices of a saved model's layers in fp8, in blocks of 32 by 32, as such models are published."""
    for name, w in list(tensors.items()):
        if "layers" in name and w.dim() == 2:
            rows, columns = w.shape
            blocks = w.view(rows // 32, 32, columns // 32, 32)
            scale = blocks.abs().amax((1, 3)) / 448
            small = (blocks / scale[:, None, :, None]).view(rows, columns)
            tensors |= {name: small.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.contiguous()}
    return {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}


def as_mxfp4(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The experts' matrices in numbers of four bits, two to a byte, 32 of a row with one power of two: as gpt-oss."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for name in list(tensors):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            groups = tensors.pop(name).mT.unflatten(-1, (-1, 32))
            power = (groups.abs().amax(-1) / 6).log2().ceil()
            scaled = groups / power.exp2()[..., None]
            codes = (scaled.abs()[..., None] - values).abs().argmin(-1) + 8 * (scaled < 0)
            tensors[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
            tensors[f"{name}_scales"] = (power + 127).to(torch.uint8)
    return {"quant_method": "mxfp4"}


@pytest.mark.parametrize(
    ("arch", "quantise", "name", "error"),
    [
        ("llama", as_fp8, "model.layers.1.mlp.down_proj.weight", 0.05),
        ("gpt_oss", as_mxfp4, "model.layers.1.mlp.experts.gate_up_proj", 0.15),
    ],
)
def test_a_quantised_source_is_dequantised(
    arch: str, quantise: Any, name: str, error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By transformers, into a copy in the cache that the next run finds."""
    monkeypatch.setenv("DLR_LOCK_CACHE", str(tmp_path / "cache"))
    folder = save_tiny(arch, tmp_path / "source")
    original = open_source(folder, dtype=torch.float32, device="cpu").model.state_dict()
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantise(tensors)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for _ in range(2):
        source = open_source(folder, dtype=torch.float32, device="cpu")
        weight = source.model.state_dict()[name]
        assert 0 < (weight - original[name]).norm() < error * original[name].norm()
        assert source.tokenizer is not None and source.dtype == torch.float32
        assert getattr(source.model.config, "quantization_config", None) is None
    (copy,) = (tmp_path / "cache").rglob("config.json")
    assert "quantization_config" not in json.loads(copy.read_text())


def test_a_file_larger_than_the_memory_is_called_that_and_not_damaged(tmp_path: Path) -> None:
    """A header and a hole, of four times the machine's memory: no block of the disk is taken."""
    size = 4 * memory_bytes(None) * 4
    save_tiny("llama", tmp_path)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    try:
        weight_files(tmp_path)
    except DLRError as error:
        assert "max_shard_size" in str(error) and "damaged" not in str(error)
    else:
        pytest.skip("this system maps more than it has")
