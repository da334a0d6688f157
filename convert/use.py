"""Using any model, locked or original: what `eval` and `generate` stand on."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..common.errors import DLRError
from ..common.files import permission_is_an_error
from ..common.hub import model_folder
from ..common.progress import Progress, no_progress
from ..runtime import load
from ..runtime.checkpoint import is_locked
from ..runtime.device import usable_device
from ..runtime.generation import check_choices, check_vocabulary, generate
from .data import read_text, sequence_length
from .evaluate import Evaluation, evaluate
from .source import compute_dtype, load_tokenizer, open_source
from .sources.adapters import is_adapter


@contextmanager
def opened(
    model: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase | None]]:
    """A locked checkpoint, a transformers directory, a hub id or a .gguf file: (model, tokenizer), while open.

    Args:
        model: Its name.
        device: Where it runs; None for the best there is.
        dtype: Of the weights in memory; None for what computes fast there, see `compute_dtype`.

    Raises:
        DLRError: Where it cannot be loaded.
    """
    place = usable_device(device)
    dtype = compute_dtype(place) if dtype is None else dtype
    if _is_locked(model):
        yield load(model, dtype=dtype, device=place), load_tokenizer(model_folder(model))
        return
    source = open_source(model, dtype=dtype, device=place)
    yield source.model, source.tokenizer


def _is_locked(model: str | Path) -> bool:
    """Whether a model is a locked checkpoint; raises DLRError where there is no model of that name."""
    with permission_is_an_error():
        if (file := Path(model).expanduser()).is_file():
            if file.suffix.lower() != ".gguf":
                raise DLRError(f"{model} is a file, but neither a model's directory nor a .gguf file")
            return False
        folder = model_folder(model, only=["config.json", "adapter_config.json"], files=" or .gguf file")
        if is_adapter(folder):
            return False
        if not (folder / "config.json").is_file():
            raise DLRError(f"{folder} has no config.json: give a directory that save_pretrained wrote")
        return is_locked(folder)


def check_models(*models: str | Path) -> None:
    """Raises DLRError, before any work, where one of several is no model by its name and config."""
    for model in models:
        _is_locked(model)


def evaluate_texts(
    checkpoint: str | Path,
    texts: Sequence[str | Path],
    *,
    original: str | Path | None = None,
    tokens: int = 10_240,
    skip: int = 0,
    device: torch.device | str | None = None,
    progress: Progress = no_progress,
) -> list[Evaluation]:
    """Loss of a model on texts, and its distance to the original where one is given.

    Args:
        checkpoint: Any model, locked or not, see `opened`.
        texts: Each as `read_text` takes it.
        original: What it is compared with, None for nothing.
        tokens: How many tokens of each text are taken, at most.
        skip: How many tokens of each are left out before, such as those that a conversion was trained on.
        device: Where the models run, None for the best there is.
        progress: Called with (what is being done, done, total).

    Returns:
        One for each text.

    Raises:
        DLRError: On what cannot be read or compared.
    """
    check_models(checkpoint, *([] if original is None else [original]))
    with ExitStack() as stack:
        model, tokenizer = stack.enter_context(opened(checkpoint, device=device))
        length = sequence_length(model)
        read = [
            read_text(text, tokenizer, tokens=tokens, sequence_length=length, skip=skip) for text in texts
        ]
        other = None if original is None else stack.enter_context(opened(original, device=device))[0]
        for sequences in read:
            for one in (model, other):
                if one is not None:
                    check_vocabulary(sequences, one, tokenizer)
        found = []
        for text, sequences in zip(texts, read, strict=True):
            what = "measuring" if len(texts) == 1 else f"measuring on {Path(text).name}"
            found.append(evaluate(model, sequences, original=other, progress=partial(progress, what)))
        return found


def evaluate_checkpoint(checkpoint: str | Path, text: str | Path, **choices: Any) -> Evaluation:
    """`evaluate_texts` of one text, with the same choices."""
    return evaluate_texts(checkpoint, [text], **choices)[0]


def complete(
    model: str | Path, prompt: str, *, device: torch.device | str | None = None, **choices: Any
) -> str:
    """The completion of `prompt` by a model, locked or not, see `opened`.

    The choices are those of `runtime.generation.generate`.

    Raises:
        DLRError: Where the model cannot be loaded, and as `generate` does.
    """
    check_choices(prompt, **choices)  # before a model is loaded
    with opened(model, device=device) as (loaded, tokenizer):
        if tokenizer is None:
            raise DLRError(f"{model} has no tokenizer, so it cannot complete a text")
        return generate(loaded, tokenizer, prompt, **choices)
