"""Which architectures can be locked: a tiny random model of each is converted, saved, read back and run.

    python -m benchmarks.architectures                    # writes docs/architectures.md
    python -m benchmarks.architectures llama t5           # a line for each of these, and writes nothing

A model that is not converted must be refused in a line of ours: anything else is a bug, and ends the command with
status 1.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from dlr_lock import convert_model, load
from dlr_lock.common.errors import DLRError, first_line
from dlr_lock.common.hooks import frozen, text_inputs

TABLE = Path(__file__).parents[1] / "docs" / "architectures.md"
VOCABULARY = 320

# Sizes by the fields' names, in the order of their values: what a config says of itself is made as small as this.
_SIZES = {
    1: "n_group topk_group n_shared_experts first_k_dense_replace moe_layer_start_index num_dense_layers "
    "moe_num_shared_experts num_shared_experts",
    2: "num_key_value_heads num_kv_heads num_hidden_layers n_layer n_layers num_layers num_decoder_layers "
    "encoder_layers decoder_layers depth num_experts_per_tok moe_k moe_topk moe_top_k linear_num_key_heads "
    "num_global_key_value_heads kv_n_heads",
    4: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
    "num_local_experts num_experts n_routed_experts moe_num_experts linear_num_value_heads mamba_num_heads "
    "mamba_n_heads n_mamba_heads",
    8: "qk_rope_head_dim qk_nope_head_dim mamba_d_state ssm_state_size state_size rotary_dim query_pre_attn_scalar "
    "mamba_d_state num_mel_bins",
    16: "head_dim d_kv v_head_dim linear_key_head_dim linear_value_head_dim global_head_dim patch_size kv_channels "
    "hidden_size_per_layer_input laurel_rank",
    32: "sliding_window window_size attention_window_size kv_lora_rank q_lora_rank image_size local_attention "
    "chunk_size mamba_chunk_size attention_chunk_size block_multiple_of max_source_positions mamba_d_head "
    "mamba_head_dim mamba_headdim",
    64: "hidden_size d_model n_embd dim word_embed_proj_dim lru_width embedding_size out_hidden_size projection_dim "
    "pooler_hidden_size attention_hidden_size",
    96: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size",
    128: "mamba_d_ssm",
    160: "intermediate_size intermediate_size_mlp d_ff ffn_dim n_inner dff hidden_dim ffn_hidden_size encoder_ffn_dim "
    "decoder_ffn_dim",
    256: "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions num_position_embeddings "
    "context_length position_embedding_size",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
}
_UNSET = ("head_dim", "n_inner", "num_key_value_heads")  # of these, None is made a size, too
_FIELDS = {name: size for size, names in _SIZES.items() for name in names.split()}

_DENSE = (
    "llama mistral ministral ministral3 qwen2 qwen3 qwen3_5_text gemma gemma2 gemma3_text gemma3n_text gemma4_text "
    "vaultgemma phi phi3 olmo olmo2 olmo3 gpt2 gpt_neo gpt_neox gptj gpt_bigcode openai-gpt opt bloom falcon falcon_h1 "
    "mpt stablelm starcoder2 codegen cohere cohere2 granite nemotron nemotron_h smollm3 jais2 arcee bamba "
    "recurrent_gemma lfm2 hunyuan_v1_dense ernie4_5 seed_oss apertus helium persimmon xglm biogpt ctrl diffllama "
    "minicpm3 nanochat exaone4 glm glm4 bitnet"
)
_ENCODERS = "bert roberta electra modernbert deberta-v2 distilbert mpnet nomic_bert eurobert albert"
_MIXTURES = (
    "mixtral phimoe qwen2_moe qwen3_moe qwen3_next qwen3_5_moe_text olmoe gpt_oss llama4_text granitemoe "
    "granitemoeshared granitemoehybrid minimax dbrx jetmoe flex_olmo deepseek_v2 deepseek_v3 glm4_moe dots1 "
    "ernie4_5_moe lfm2_moe jamba longcat_flash hunyuan_v1_moe"
)
_SEEING = "mistral3 qwen2_5_vl qwen3_vl qwen3_5 gemma3 gemma4 llava smolvlm idefics3 llama4 qwen3_vl_moe"
_PAIRED = "t5 mt5 umt5 bart mbart pegasus blenderbot marian m2m_100 whisper"
_OTHER = "mamba mamba2 rwkv zamba2 siglip vit clip"
KINDS = {
    "Dense language models": _DENSE,
    "Mixtures of experts": _MIXTURES,
    "Encoders": _ENCODERS,
    "Encoder-decoders": _PAIRED,
    "Models that see": _SEEING,
    "Others": _OTHER,
}

# What the general rule leaves impossible, by model_type.
_HYBRID = ["linear_attention", "full_attention"]
_MLA = {"qk_rope_head_dim": 8, "qk_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4}
_GEMMA = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2},
    "deepseek_v3": _MLA,
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "gemma3n": {"text_config": _GEMMA},
    "gemma3n_text": _GEMMA,
    "gemma4": {"text_config": _GEMMA},
    "gemma4_text": _GEMMA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {
        "text_config": {"num_experts_per_tok": 1},
        "vision_config": {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
    },
    "llama4_text": {"num_experts_per_tok": 1},
    "longcat_flash": {**_MLA, "zero_expert_num": 2},
    "marian": {"decoder_start_token_id": 2},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "n_groups": 2},
    "qwen2_5_vl": {"text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}},
    "qwen3_5": {"text_config": {"layer_types": _HYBRID}},
    "qwen3_5_moe_text": {"layer_types": _HYBRID},
    "qwen3_5_text": {"layer_types": _HYBRID},
    "qwen3_next": {"layer_types": _HYBRID},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zamba2": {
        "layers_block_type": [*_HYBRID[:1], "hybrid"] * 2,
        "num_hidden_layers": 4,
        "mamba_headdim": 32,
        "n_mamba_heads": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
}


def tiny_config(model_type: str) -> Any:
    """The configuration of a model of two layers and a width of 64."""
    default = AutoConfig.for_model(model_type)
    values = _shrunk(default) | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    for name, value in _OWN.get(model_type, {}).items():
        values[name] = values.get(name, {}) | value if isinstance(value, dict) else value
    return AutoConfig.for_model(model_type, **values)


def _shrunk(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        part = getattr(config, name, None) if isinstance(value, dict) else None
        if isinstance(part, transformers.PreTrainedConfig):
            values[name] = _shrunk(part)
            if part.model_type in transformers.CONFIG_MAPPING:
                values[name]["model_type"] = part.model_type
            if "text" in name:
                values[name] |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        elif name in _FIELDS and (isinstance(value, int) or (value is None and name in _UNSET)):
            values[name] = _FIELDS[name]
    return values


def tiny_model(model_type: str) -> PreTrainedModel:
    """A random model, wide enough drawn that a missing part shows."""
    config = tiny_config(model_type)
    for family in (
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForSpeechSeq2Seq,
        transformers.AutoModelForCausalLM,
        transformers.AutoModel,
    ):
        encoder = model_type in _ENCODERS.split() and family is not transformers.AutoModel
        if type(config) in family._model_mapping and not encoder:
            break
    torch.manual_seed(0)
    model = family.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.05)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and three special tokens."""
    special = ["<s>", "</s>", "<pad>"]
    words = {word: i for i, word in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos, pad = special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture.

    Attributes:
        locked: Whether it was converted, and is the same when it is read back.
        words: What was locked and how, or why not.
        bug: Whether it ended in anything but that or a refusal in a line of ours.
    """

    locked: bool
    words: str
    bug: bool = False


def outcome(model_type: str, folder: Path) -> Outcome:
    """Converts a tiny model of an architecture, reads it back, saves and reads it once more, and runs it.

    Args:
        model_type: By transformers' name.
        folder: An empty one.
    """
    try:
        tiny_model(model_type).save_pretrained(folder / "source")
        tiny_tokenizer().save_pretrained(folder / "source")
    except Exception as error:
        return Outcome(False, f"no tiny model could be made here: {first_line(error)}")
    text = folder / "text.txt"
    text.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    sizes = {"tokens": 3072, "heldout": 512, "sequence": 64, "batch": 256, "train_tokens": 3072}
    try:
        report = convert_model(
            folder / "source",
            folder / "out",
            data=str(text),
            device="cpu",
            redistill=0.0,
            end_to_end=0,
            **sizes,
        )
        first = _said(folder / "out", folder / "again")
        if not torch.equal(first, _said(folder / "again")):
            return Outcome(False, "it is another model when it is saved again", bug=True)
    except DLRError as error:
        return Outcome(False, str(error).replace(str(folder / "source"), "it").replace("\n", " "))
    except Exception as error:
        traceback.print_exc()
        return Outcome(False, f"{type(error).__name__}: {first_line(error)}", bug=True)
    notes = [report.across]
    notes += [f"{len(report.modules)} of {report.mlps} MLPs"] if len(report.modules) != report.mlps else []
    notes += [
        note.removeprefix("modules were distilled independently: ")
        for note in report.warnings
        if "independently" in note or "a norm follows" in note
    ]
    return Outcome(True, "; ".join(notes))


def _said(folder: Path, again: Path | None = None) -> torch.Tensor:
    """What the locked model in `folder` gives for some tokens, and writes after them. again: where it is saved."""
    model = load(folder, device="cpu", dtype=torch.float32)
    if again is not None:
        model.save_pretrained(again)
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with frozen(model):
        states = model(**text_inputs(model, ids))[0]
        if model.can_generate():
            model.generate(ids, max_new_tokens=4, do_sample=False)
    return states.float()


_HEAD = """\
# Architectures

Made by `python -m benchmarks.architectures` with transformers {version}: a model of random weights of each architecture
(two layers, 64 wide) was converted, read back, saved, read back once more and compared bit for bit, and wrote text
where it can. "Sequential" modules correct the errors of those before them, "independent" ones do not. What is refused
ends in the one line that is shown, before any work.

{counts}
"""


def table(found: dict[str, dict[str, Outcome]]) -> str:
    """The page of all outcomes, by kind and model_type, in Markdown."""
    every = [o for kind in found.values() for o in kind.values()]
    locked = sum(o.locked for o in every)
    parts = [
        _HEAD.format(
            version=transformers.__version__,
            counts=f"{locked} of {len(every)} are locked, {len(every) - locked} are refused.",
        )
    ]
    for kind, outcomes in found.items():
        rows = [
            f"| {name} | {'locked' if o.locked else 'refused'} | {_cell(o.words)} |"
            for name, o in outcomes.items()
        ]
        parts.append(
            "\n".join([f"## {kind}", "", "| model_type | | how, or why not |", "|---|---|---|", *rows, ""])
        )
    return "\n".join(parts)


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


def main(names: list[str]) -> int:
    """Tries the architectures named, or all of them and writes the page. The exit status."""
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    known = {name: kind for kind, group in KINDS.items() for name in group.split()}
    found: dict[str, dict[str, Outcome]] = {}
    for name in names or known:
        if name not in known:
            print(f"unknown architecture {name}; one of {', '.join(known)}", file=sys.stderr)
            return 2
        with tempfile.TemporaryDirectory() as folder:
            done = outcome(name, Path(folder))
        found.setdefault(known[name], {})[name] = done
        print(
            f"{name}: {'BUG: ' if done.bug else ''}{'locked' if done.locked else 'refused'}; {done.words}",
            flush=True,
        )
    if not names:
        TABLE.write_text(table(found), encoding="utf-8")
    return int(any(o.bug for kind in found.values() for o in kind.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
