"""Using any model, locked or original: what `eval` and `generate` stand on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..common.errors import DLRError
from ..common.files import permission_is_an_error
from ..common.hub import model_folder
from ..common.progress import Progress, no_progress
from ..runtime import load
from ..runtime.checkpoint import is_locked
from ..runtime.device import usable_device
from ..runtime.generation import check_vocabulary, generate
from .data import read_text, sequence_length
from .evaluate import Evaluation, evaluate
from .source import compute_dtype, load_tokenizer, open_source


@contextmanager
def opened(
    model: str | Path, *, device: torch.device | str | None = None
) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase | None]]:
    """A locked checkpoint, a transformers directory, a hub id or a .gguf file: (model, tokenizer), while open.

    Raises:
        DLRError: Where it cannot be loaded.
    """
    place = usable_device(device)
    dtype = compute_dtype(place)
    with permission_is_an_error():
        file = Path(model).expanduser().is_file()
        locked = not file and is_locked(model_folder(model, only=["config.json"], files=" or .gguf file"))
    if locked:
        yield load(model, dtype=dtype, device=place), load_tokenizer(model_folder(model))
        return
    source = open_source(model, dtype=dtype, device=place)
    yield source.model, source.tokenizer


def evaluate_checkpoint(
    checkpoint: str | Path,
    text: str | Path,
    *,
    original: str | Path | None = None,
    tokens: int = 10_240,
    device: torch.device | str | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Loss of a model on a text, and its distance to the original where one is given.

    Args:
        checkpoint: Any model, locked or not, see `opened`.
        text: As `load_text` takes it, but for 'self'.
        original: What it is compared with, None for nothing.
        tokens: How many tokens of the text are taken, at most.
        device: Where the models run, None for the best there is.
        progress: Called with (what is being done, done, total).

    Raises:
        DLRError: On what cannot be read or compared.
    """

    def measuring(done: int, total: int) -> None:
        progress("measuring", done, total)

    with opened(checkpoint, device=device) as (model, tokenizer):
        sequences = read_text(text, tokenizer, tokens=tokens, sequence_length=sequence_length(model))
        check_vocabulary(sequences, model, tokenizer)
        if original is None:
            return evaluate(model, sequences, progress=measuring)
        with opened(original, device=device) as (other, _):
            check_vocabulary(sequences, other, tokenizer)
            return evaluate(model, sequences, original=other, progress=measuring)


def complete(
    model: str | Path,
    prompt: str,
    *,
    emit: Callable[[str], None] = lambda text: None,
    device: torch.device | str | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> str:
    """The completion of `prompt` by a model, locked or not; see `runtime.generation.generate`."""
    with opened(model, device=device) as (loaded, tokenizer):
        if tokenizer is None:
            raise DLRError(f"{model} has no tokenizer, so it cannot complete a text")
        return generate(
            loaded,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            chat=chat,
            emit=emit,
        )
