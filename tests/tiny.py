"""Tiny random models of many architectures, and a tiny real tokenizer, made offline in milliseconds.

    model = tiny_model("gpt2", seed=1, layers=3)
    folder = save_tiny("llama", tmp_path / "llama")      # model + tokenizer, as save_pretrained writes them

Width 64 and vocabulary 320 unless overridden. Weights are drawn wide enough (standard deviation 0.1) and biases
away from zero, so that a test sees an MLP that is missing or a bias that is dropped.
"""

import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 320
HIDDEN = 64
INTERMEDIATE = 160
HEADS = 4
MIXTURES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "olmoe",
    "granitemoe",
    "llama4_text",
]
KV_HEADS = 2
POSITIONS = 256

# How the families spell their sizes; a value that is a string names the size put there.
_LLAMA = {
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "num_hidden_layers": "layers",
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HIDDEN // HEADS,
    "max_position_embeddings": POSITIONS,
}
_PLAIN = {k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "head_dim")}
_GPT2 = {
    "n_embd": "hidden",
    "n_inner": "intermediate",
    "n_layer": "layers",
    "n_head": HEADS,
    "n_positions": POSITIONS,
}
_MOE = {**_LLAMA, "num_experts_per_tok": 2}
_T5 = {
    "d_model": "hidden",
    "d_ff": "intermediate",
    "num_layers": "layers",
    "num_heads": HEADS,
    "d_kv": 16,
    "decoder_start_token_id": 2,
}

_SIZES: dict[str, dict[str, Any]] = {
    "albert": {**_PLAIN, "embedding_size": 32},
    "bart": {
        "d_model": "hidden",
        **{f"{side}_layers": "layers" for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": "intermediate" for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")},
        "max_position_embeddings": POSITIONS,
        "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
        "init_std": 0.1,
    },
    "bert": _PLAIN,
    "bitnet": _LLAMA,
    "bloom": {"hidden_size": "hidden", "n_layer": "layers", "n_head": HEADS},
    "cohere": _LLAMA,
    "deepseek_v3": {
        **_PLAIN,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": HEADS,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
    },
    "falcon": {
        **_PLAIN,
        "ffn_hidden_size": "intermediate",
        "new_decoder_architecture": False,
        "alibi": False,
    },
    "gemma": _LLAMA,
    "gpt_oss": {**_MOE, "num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "granitemoe": {**_MOE, "num_local_experts": 4},
    "gemma2": {**_LLAMA, "query_pre_attn_scalar": 16, "sliding_window": 32},
    "gemma3_text": {**_LLAMA, "query_pre_attn_scalar": 16, "sliding_window": 32},
    "glm": {**_LLAMA, "attention_bias": True},
    "gpt2": _GPT2,
    "gpt_neox": _PLAIN,
    "gptj": {**_GPT2, "rotary_dim": 8},
    "helium": _LLAMA,
    "llama": _LLAMA,
    "llama4_text": {
        **_MOE,
        "num_experts_per_tok": 1,
        "num_local_experts": 4,
        "intermediate_size_mlp": "intermediate",
        "interleave_moe_layer_step": 2,
        "moe_layers": None,
    },
    "mamba": {"hidden_size": "hidden", "num_hidden_layers": "layers", "state_size": 8},
    "mistral": _LLAMA,
    "mixtral": {**_MOE, "num_local_experts": 4},
    "mpt": {"d_model": "hidden", "n_layers": "layers", "n_heads": HEADS, "max_seq_len": POSITIONS},
    "nemotron": _LLAMA,
    "olmo2": _LLAMA,
    "olmoe": {**_MOE, "num_experts": 4},
    "opt": {**_PLAIN, "ffn_dim": "intermediate", "word_embed_proj_dim": "hidden"},
    "phi": _PLAIN,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": {
        **_MOE,
        "num_experts": 4,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 96,
    },
    "qwen3": _LLAMA,
    "qwen3_moe": {**_MOE, "num_experts": 4, "moe_intermediate_size": 96},
    "stablelm": {**_PLAIN, "num_key_value_heads": KV_HEADS, "use_qkv_bias": True},
    "starcoder2": _LLAMA,
    "t5": {**_T5, "feed_forward_proj": "gated-gelu"},
}

ENCODERS = ("albert", "bert")
PAIRED = ("bart", "t5")  # an encoder and a decoder
ARCHITECTURES = tuple(_SIZES)


def tiny_config(arch: str, layers: int = 2, **overrides: Any) -> Any:
    """The configuration behind `tiny_model`; `overrides` are its own fields, by their own names."""
    sizes = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "layers": layers}
    fields = {k: sizes[v] if isinstance(v, str) and v in sizes else v for k, v in _SIZES[arch].items()}
    fields |= {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if arch not in PAIRED:
        fields["initializer_range"] = 0.1
    return AutoConfig.for_model(arch, **{**fields, **overrides})


def tiny_model(arch: str, seed: int = 0, layers: int = 2, **overrides: Any) -> PreTrainedModel:
    """A random model of `arch` (one of ARCHITECTURES) in eval mode, float32, on the CPU.

    A causal language model, but for ENCODERS, whose bare encoder it is, and PAIRED, which have a head,
    too. Global random state is left alone.
    """
    config = tiny_config(arch, layers, **overrides)
    paired = AutoModelForSeq2SeqLM if arch in PAIRED else AutoModelForCausalLM
    family = AutoModel if arch in ENCODERS else paired
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.05)
                elif "experts" in name and parameter.dim() == 3:  # Llama 4's start at zero
                    parameter.normal_(0, 0.1)
    return model.eval()


_LINES = [
    "The river runs down to the sea, and the sea gives the water back to the hills.",
    "A model reads one token at a time and says what it believes the next token to be.",
    "def forward(self, x):\n    return self.down(act(self.gate(x)) * self.up(x))\n",
    "In 1969 two people walked on the moon; some 600 million others watched them do it.",
]


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES, trainer)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 tokens; ids 0, 1, 2 are <s>, </s>, <pad>; any text survives encode and decode."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=POSITIONS,
    )


def save_tiny(
    arch: str, folder: Path, *, tokenizer: bool = True, seed: int = 0, layers: int = 2, **overrides: Any
) -> Path:
    """Write `tiny_model(arch, ...)` and the tokenizer as a transformers directory; returns `folder`."""
    tiny_model(arch, seed, layers, **overrides).save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def as_hub_copy(folder: Path, name: str, cache: Path) -> Path:
    """Puts a model's folder into a hub cache as a download of the repository `name`: every file a link to a blob."""
    revision = "0123456789abcdef" * 2 + "01234567"
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = repository / "snapshots" / revision / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copyfile(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return repository / "snapshots" / revision


def write_gguf(model: PreTrainedModel, file: Path) -> Path:
    """A float32 GGUF of a tiny Llama, as llama.cpp's converter lays it out."""
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_license("mit")
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_context_length(model.config.max_position_embeddings)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(model.config.vocab_size)
    tokenizer = tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(state["vocab"], key=state["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(state["vocab"]))])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
        if heads:  # the two halves of a rotary pair lie side by side in a GGUF
            tensor = tensor.view(heads, 2, -1, HIDDEN).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
