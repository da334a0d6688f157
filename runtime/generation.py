"""Text from a model, piece by piece."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BatchEncoding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from ..common.errors import DLRError, first_line
from ..common.hooks import is_paired


class _Pieces(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._emit(text)


def positions(config: PretrainedConfig) -> int | None:
    """The longest sequence that a model of this config states to take, None where it states none."""
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return None


def check_vocabulary(ids: Tensor, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raises DLRError on a token of `ids` that the model has no embedding of."""
    rows, largest = len(model.get_input_embeddings().weight), int(ids.max())
    if largest >= rows:
        word = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(largest)!r})"
        raise DLRError(
            f"the tokenizer gives token {largest}{word}, the model's embedding has {rows} rows: they do not belong "
            "together, or tokens were added and the embedding was not resized"
        )


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
    emit: Callable[[str], None] = lambda text: None,
) -> str:
    """The completion of a prompt, handed over as it grows.

    Args:
        model: Any model that generates text.
        tokenizer: Its tokenizer.
        prompt: The text to go on from.
        max_new_tokens: Tokens to generate at most.
        temperature: Of the sampling; 0 for the likeliest token every time.
        top_p: Only the likeliest tokens that have this share of the chances together are sampled; None as the model's
            generation config says, here and below.
        top_k: Only so many of the likeliest tokens are sampled; 0 for all.
        repetition_penalty: What chances of tokens that are there already are divided by, above 1 for fewer.
        seed: Of the sampling.
        chat: Whether the prompt goes through the tokenizer's chat template as a user's message.
        system: A system's message before it, which goes through the template, too.
        emit: Called with each piece of the text.

    Returns:
        The whole completion.

    Raises:
        DLRError: On an empty prompt or one that is no text, a chat template that is not there, numbers that make no
            sense, and a model that cannot generate.
    """
    if not model.can_generate():
        raise DLRError(f"a {type(model).__name__} cannot generate text")
    check_choices(
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        system=system,
    )
    if chat or system is not None:
        inputs = _templated(tokenizer, prompt, system)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise DLRError("the prompt is empty")
    check_vocabulary(inputs["input_ids"], model, tokenizer)
    paired = is_paired(model)  # the prompt is the encoder's, the new tokens are the decoder's
    lengths = (inputs["input_ids"].shape[1], max_new_tokens)
    limit, wanted = positions(model.config), max(lengths) if paired else sum(lengths)
    if limit is not None and wanted > limit:
        raise DLRError(f"prompt and new tokens make {wanted} tokens, the model takes {limit}: ask for fewer")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampling["repetition_penalty"] = repetition_penalty
    ids = inputs["input_ids"].to(model.device)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            attention_mask=inputs["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            streamer=_Pieces(tokenizer, emit),
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            **{name: value for name, value in sampling.items() if value is not None},
        )
    return tokenizer.decode(output[0, 0 if paired else ids.shape[1] :], skip_special_tokens=True)


def check_choices(
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
    system: str | None = None,
    **others: Any,
) -> None:
    """Raises DLRError on what `generate` would refuse of its choices whatever the model: nothing need be loaded."""
    try:
        f"{prompt}{system or ''}".encode()
    except UnicodeEncodeError as error:  # an argument's undecodable bytes are lone surrogates here
        raise DLRError("the prompt is not UTF-8 text: convert it, for example with iconv -t UTF-8") from error
    if max_new_tokens < 1:
        raise DLRError(f"at least one new token is needed, not {max_new_tokens}")
    if not (temperature == 0 or 1e-3 <= temperature <= 1e3):
        raise DLRError(f"the temperature must be 0 or from 0.001 to 1000, not {temperature:g}")
    if temperature == 0 and not (top_p is None and top_k is None):
        raise DLRError("top-p and top-k choose among sampled tokens: give a temperature above 0, too")
    if top_p is not None and not 0 < top_p <= 1:
        raise DLRError(f"top-p must be above 0 and at most 1, not {top_p:g}")
    if top_k is not None and top_k < 0:
        raise DLRError(f"top-k must be 0 (all tokens) or more, not {top_k}")
    if repetition_penalty is not None and not 1e-3 <= repetition_penalty <= 1e3:
        raise DLRError(
            f"the repetition penalty must be from 0.001 to 1000 (1 for none), not {repetition_penalty:g}"
        )
    if not 0 <= seed < 2**62:
        raise DLRError(f"the seed must be from 0 to {2**62 - 1}, not {seed}")


def _templated(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None) -> BatchEncoding:
    if not tokenizer.chat_template:
        raise DLRError("this tokenizer has no chat template; leave --chat and --system out")
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # a template is a program of its author's, with errors of its own
        raise DLRError(
            f"the model's chat template does not take these messages: {first_line(error)}"
        ) from error
