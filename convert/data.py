"""Calibration text: read it, tokenize it, pack it into sequences of one length, keep a part of it back.

Text comes from a file (.txt, .jsonl, .parquet), from a dataset that the `datasets` package can fetch, or from
the model itself. All of it is streamed: reading stops as soon as enough tokens are there, so that a file of
any size costs no more than the part that is used.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.errors import DLRError
from ..common.hooks import frozen, is_paired
from ..common.progress import Count, Progress, no_count
from ..common.splits import hold_out
from ..common.text_sources import check_there, open_text
from ..runtime.generation import check_vocabulary, positions
from .config import ConversionConfig
from .source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


SEQUENCE_LENGTH = 512  # tokens of a sequence of calibration text, where the model can take as many
DIVERSE = 0.5  # share of distinct 4-grams below which a calibration text is called poor

_NO_WORDS = "the model comes without a tokenizer, so text cannot be turned into tokens: use --data self"
_NOT_OF_ITS_OWN = "an encoder-decoder writes nothing of its own accord: give it a text, --data text.txt"
_NO_HEAD = "text cannot be sampled: the model has no language-model head; give it a text, --data text.txt"

# Keys and values of one batch of sampled sequences stay below this.
_CACHE_BYTES = 2 * 2**30
_MAX_SAMPLED_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class CalibrationText:
    """Token ids packed into sequences of n tokens.

    Attributes:
        train: [S, n] int64, in the order of the text.
        heldout: [H, n] int64, taken from the same text at even distances; no sequence is in both.
        behind: [M, n] int64, what follows both in the text, as far as it was asked for and there is more.
        source: What the text is, fit for a model card (a file's name without its folder).
    """

    train: Tensor
    heldout: Tensor
    behind: Tensor
    source: str

    def unseen(self, tokens: int) -> Tensor:
        """[P, n] int64: text for about so many training tokens of chains that were fitted on `train`, what they have
        not seen before what they have: SmolLM2's thirty had a KL of 0.60 where they were fitted and 0.69 elsewhere."""
        wanted = -(-tokens // self.train.shape[1])
        short = wanted - len(self.behind)
        if short <= 0:
            return self.behind[:wanted]
        return torch.cat([self.behind, self.train[:: max(1, len(self.train) // short)]])


def load_text(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    tokens: int,
    heldout_tokens: int = 10_240,
    sequence_length: int = 512,
    model: PreTrainedModel | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    behind: int = 0,
    progress: Count = no_count,
) -> CalibrationText:
    """Reads calibration text and packs it into sequences, a part of which is held out.

    Documents are joined with the EOS token where the tokenizer has one. A sequence starts and ends with the tokens
    (BOS; CLS and SEP) that the tokenizer puts around a text by default, if it does.

    Args:
        source: One of
            a file: .txt; .jsonl or .parquet with a string in `text` (or with one string field only);
            a dataset: `name`, `name:split` or `name:config:split` (split `train` unless said otherwise);
            `self`: sequences sampled from `model` at `temperature`, always the same for the same `seed`.
        tokenizer: The model's, None where it has none.
        tokens: Tokens to train on, rounded down to sequences.
        heldout_tokens: Tokens to measure on, likewise.
        sequence_length: Tokens of a sequence.
        model, seed, temperature: What `self` samples from, and how.
        behind: Tokens that follow those, at most, of a text that is not sampled.
        progress: Called with (tokens so far, wanted).

    Raises:
        DLRError: Where the text cannot be read or there is too little of it.
    """
    n = sequence_length
    _check_lengths(n, tokens)
    train, heldout = tokens // n, max(1, heldout_tokens // n)
    total = train + heldout

    name = str(source)
    if name == "self":
        packed = _sample(model, tokenizer, total, n, seed, temperature, progress)
        label = f"sampled from the model itself (temperature {temperature:g}, seed {seed})"
    else:
        if tokenizer is None:
            raise DLRError(_NO_WORDS)
        documents, label = open_text(name)
        packed = _pack(
            documents,
            tokenizer,
            total,
            n,
            label,
            wanted=(train * n, heldout * n),
            more=behind // n,
            progress=progress,
        )

    held = hold_out(total, heldout)
    packed, rest = packed[:total], packed[total:]
    return CalibrationText(train=packed[~held], heldout=packed[held], behind=rest, source=label)


def calibration_text(original: Source, config: ConversionConfig, progress: Progress) -> CalibrationText:
    """The text that a resolved configuration names, in the model's tokens.

    Raises:
        DLRError: As `check_text` and `load_text` do, and where the model has no embedding of a token.
    """
    assert config.tokens and config.heldout  # resolved
    check_text(config, original.model, words=original.tokenizer is not None)
    text = load_text(
        config.data,
        original.tokenizer,
        tokens=config.tokens,
        heldout_tokens=config.heldout,
        sequence_length=config.sequence or sequence_length(original.model),
        model=original.model,
        seed=config.seed,
        temperature=config.temperature,
        behind=config.end_to_end or 0,
        progress=partial(progress, "calibration text"),
    )
    check_vocabulary(torch.cat([text.train, text.heldout, text.behind]), original.model, original.tokenizer)
    return text


def check_text(config: ConversionConfig, model: PreTrainedModel, *, words: bool) -> None:
    """Looks at what a resolved configuration says of the text, before a token is read.

    Args:
        config: It.
        model: The original, or its class on the meta device.
        words: Whether it has a tokenizer.

    Raises:
        DLRError: Where there is no such text, it cannot be had of the model, or the model cannot take sequences of the
            length that is asked for.
    """
    room = positions(model.config)
    if config.sequence and room and config.sequence > room:
        raise DLRError(f"--sequence {config.sequence}: the model takes at most {room} tokens")
    _check_lengths(config.sequence or sequence_length(model), config.tokens or 0)
    if config.data != "self":
        if not words:
            raise DLRError(_NO_WORDS)
        check_there(config.data)
    elif is_paired(model):
        raise DLRError(_NOT_OF_ITS_OWN)
    elif model.get_output_embeddings() is None:
        raise DLRError(_NO_HEAD)


def _check_lengths(n: int, tokens: int) -> None:
    """Raises DLRError where so many tokens make no sequence of n."""
    if n < 2:
        raise DLRError(
            f"sequence length {n} is too short: there is nothing to predict in fewer than 2 tokens"
        )
    if tokens < n:
        raise DLRError(f"{tokens} calibration tokens are less than one sequence of {n}: ask for at least {n}")


def sequence_length(model: PreTrainedModel) -> int:
    """Tokens a sequence of calibration text: 512, or what the model can take."""
    return min(SEQUENCE_LENGTH, positions(model.config) or SEQUENCE_LENGTH)


def poor_text(tokens: Tensor) -> str | None:
    """A warning where text [S, n] repeats itself, None where it does not: the share of its 4-grams that are
    distinct. A chain is as good as the inputs it has seen: on SmolLM2's layer 12, 1.64 M training tokens gave a
    relative error of 0.215 with 160,000 distinct tokens and 0.175 with 494,000."""
    grams = tokens.unfold(1, min(4, tokens.shape[1]), 1).flatten(0, 1)
    distinct = len(torch.unique(grams, dim=0)) / len(grams)
    if distinct >= DIVERSE:
        return None
    return (
        f"the calibration text repeats itself: {100 * distinct:.0f}% of its 4-grams are distinct (prose: 75% and "
        "more); text of more variety gives a better fit"
    )


def read_text(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    tokens: int,
    sequence_length: int,
    skip: int = 0,
) -> Tensor:
    """The beginning of a text, or of what follows its first tokens, to measure a model on.

    Args:
        source: A file or a dataset as for `load_text`.
        tokenizer: The model's.
        tokens: How many tokens of the text are taken, at most.
        sequence_length: Tokens of a sequence; fewer where the text is shorter.
        skip: How many tokens are left out before.

    Returns:
        [S, n] int64.

    Raises:
        DLRError: Where the text cannot be read or is empty.
    """
    if tokenizer is None:
        raise DLRError("the model comes without a tokenizer, so text cannot be turned into tokens")
    if tokens < 2:
        raise DLRError(f"{tokens} tokens are too few to predict anything")
    if skip < 0:
        raise DLRError(f"--skip must not be negative, not {skip}")
    if str(source).lower() == "self":
        raise DLRError("'self' is no text to measure a model on: give a file or a dataset")
    documents, label = open_text(str(source))
    prefix, suffix = _frame(tokenizer)
    ids = array("q")
    for document in documents:
        for piece in document:
            ids.extend(_encode(tokenizer, piece))
            if len(ids) >= skip + tokens:
                break
        if len(ids) >= skip + tokens:
            break
    if skip and len(ids) <= skip:
        raise DLRError(f"{label} has {len(ids):,} tokens: nothing is left behind the {skip:,} to skip")
    ids = ids[skip:]
    body = min(sequence_length - len(prefix) - len(suffix), len(ids), tokens)
    if body < 1 or body + len(prefix) + len(suffix) < 2:
        raise DLRError(f"{label} has no text to predict")
    rows = min(len(ids), tokens) // body
    text = torch.tensor(ids[: rows * body], dtype=torch.int64).view(rows, body)
    frame = [torch.tensor(part, dtype=torch.int64).expand(rows, -1) for part in (prefix, suffix)]
    return torch.cat([frame[0], text, frame[1]], 1)


def english_topics() -> str:
    """About 460 kB of English prose that every Python installation has: the reference behind help()."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DLRError(
            "this Python was installed without pydoc_data: give a text file of your own"
        ) from error
    return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"


def _pack(
    documents: Iterable[Iterable[str]],
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    n: int,
    label: str,
    wanted: tuple[int, int],
    more: int,
    progress: Count,
) -> Tensor:
    """[sequences and up to `more`, n] int64 from the beginning of the documents."""
    prefix, suffix = _frame(tokenizer)
    body = n - len(prefix) - len(suffix)  # tokens of text in a sequence
    if body < 1:
        raise DLRError(
            f"sequence length {n} leaves no room between the {len(prefix)} tokens that start a sequence and the "
            f"{len(suffix)} that end it"
        )
    enough, most = sequences * body, (sequences + more) * body
    ids = array("q")
    joint = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        before = len(ids)
        for piece in document:
            if piece.strip():
                if joint and before and len(ids) == before:
                    ids.extend(joint)
                ids.extend(_encode(tokenizer, piece))
                progress(min(len(ids), most), most)
            if len(ids) >= most:
                break
        if len(ids) >= most:
            break
    if not ids:
        raise DLRError(f"{label} is empty: there is no text in it")
    if len(ids) < enough:
        raise DLRError(
            f"{label} has {len(ids):,} tokens, {enough:,} are wanted ({wanted[0]:,} for calibration, "
            f"{wanted[1]:,} held out): give more text, a smaller --tokens, or --data self"
        )
    sequences = min(len(ids), most) // body
    packed = torch.empty(sequences, n, dtype=torch.int64)
    packed[:, : len(prefix)] = torch.tensor(prefix, dtype=torch.int64)
    packed[:, len(prefix) : n - len(suffix)] = torch.frombuffer(ids, dtype=torch.int64)[
        : sequences * body
    ].view(sequences, body)
    packed[:, n - len(suffix) :] = torch.tensor(suffix, dtype=torch.int64)
    return packed


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    # Half a surrogate pair (JSON can hold one) is not text, and tokenizers refuse it.
    text = text.encode("utf-8", "replace").decode("utf-8")
    encoded = tokenizer(text, add_special_tokens=special, truncation=False, padding=False, verbose=False)
    return list(encoded["input_ids"])


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What this tokenizer puts around a text of its own accord: [BOS] before it; [CLS] before and [SEP] behind."""
    plain, full = _encode(tokenizer, "a"), _encode(tokenizer, "a", special=True)
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


# --- text from the model itself


def _sample(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    sequences: int,
    n: int,
    seed: int,
    temperature: float,
    progress: Count,
) -> Tensor:
    """[sequences, n] int64, sampled from BOS (or an ordinary random token) on, never stopped at EOS.

    A random generator of its own, so that the caller's random numbers stay as they are. Our own loop instead
    of model.generate(): that one takes top-k, penalties and stop tokens from the model's generation config.
    """
    if model is None:
        raise DLRError("text can be sampled only from a model: give one with 'self'")
    if not temperature > 0:
        raise DLRError(f"temperature {temperature:g}: it must be above 0")
    if is_paired(model):
        raise DLRError(_NOT_OF_ITS_OWN)
    device = model.device
    generator = torch.Generator(device=device).manual_seed(seed)
    at_once = max(1, min(_MAX_SAMPLED_AT_ONCE, _CACHE_BYTES // (n * _cache_bytes_per_token(model))))
    packed = torch.empty(sequences, n, dtype=torch.int64)
    with frozen(model):
        for begin in range(0, sequences, at_once):
            rows = packed[begin : begin + at_once]
            ids = _first_tokens(model, tokenizer, len(rows), generator).to(device)
            check_vocabulary(ids, model, tokenizer)
            cache = None
            for position in range(1, n):
                rows[:, position - 1] = ids[:, -1]
                state: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
                output = model(input_ids=ids if cache is None else ids[:, -1:], use_cache=True, **state)
                cache = getattr(output, "past_key_values", None)
                if getattr(output, "logits", None) is None:
                    raise DLRError(_NO_HEAD)
                chances = (output.logits[:, -1].float() / temperature).softmax(-1)
                if not chances.isfinite().all():
                    raise DLRError("text cannot be sampled: the model's logits contain NaN or infinity")
                ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
                progress(begin * n + position * len(rows), sequences * n)
            rows[:, n - 1] = ids[:, -1]
    progress(sequences * n, sequences * n)
    return packed


def _cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Keys and values of one token, at most (as if every head had its own)."""
    config = model.config.get_text_config()
    layers, width = getattr(config, "num_hidden_layers", 1), getattr(config, "hidden_size", 1)
    return max(1, 2 * layers * width * model.dtype.itemsize)


def _first_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, count: int, generator: torch.Generator
) -> Tensor:
    """[count, 1] int64: BOS, or random tokens (none of them special) where the tokenizer has no BOS."""
    bos = None if tokenizer is None else tokenizer.bos_token_id
    if bos is not None:
        return torch.full((count, 1), bos)
    vocabulary = model.get_input_embeddings().num_embeddings
    ordinary = torch.arange(vocabulary)
    if tokenizer is not None:
        special = torch.tensor(tokenizer.all_special_ids, dtype=torch.int64)
        ordinary = torch.arange(min(len(tokenizer), vocabulary))
        ordinary = ordinary[~torch.isin(ordinary, special)]
    draw = torch.randint(len(ordinary), (count, 1), generator=generator, device=generator.device)
    return ordinary[draw.cpu()]


def digest(*tokens: Tensor) -> str:
    """SHA-256 of token ids, one tensor after the other."""
    hashed = hashlib.sha256()
    for ids in tokens:
        hashed.update(ids.numpy().tobytes())
    return hashed.hexdigest()
