"""What a conversion refuses by its choices and the model's shapes: before the work, and in a plan alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...common.errors import DLRError
from ...reporting.words import bytes_words
from ..config import ConversionConfig
from ..data import check_text, sequence_length
from ..experts.fit import check_sizes
from ..layer_runner import Unrepeatable, check_one_text
from ..mlp_discovery import automatic
from ..mlp_matching import MLP
from .sensitivity import why_unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_choices(
    config: ConversionConfig,
    model: PreTrainedModel,
    mlps: Sequence[MLP],
    every: Sequence[MLP],
    *,
    size: float,
    whole: bool,
    words: bool,
) -> None:
    """Looks at the choices beside the model that they are for.

    Args:
        config: Resolved.
        model: The original, or its class on the meta device.
        mlps: The MLPs to be converted, or stand-ins.
        every: All that the model has.
        size: Bytes of the model's weights where they are computed with.
        whole: Whether all of them are in memory at once.
        words: Whether the model has a tokenizer.

    Raises:
        DLRError: On what a conversion cannot do.
    """
    if automatic(config.layers):
        length = config.sequence or sequence_length(model)
        if why := why_unknown(model, every, (config.tokens or 0) // length * length, whole=whole):
            raise DLRError(f"--layers {config.layers}: {why}")
        mlps = every
    check_sizes(config, mlps)
    if config.across == "sequential":
        try:
            check_one_text(model)
        except Unrepeatable as error:
            raise DLRError(f"the model cannot be distilled sequentially: {error}") from error
    if config.end_to_end and not whole:
        how = "allow them by --max-memory" if config.device == "cpu" else "take a GPU with twice as much free"
        raise DLRError(
            f"the end-to-end phase wants all {bytes_words(size)} of the model in memory: {how}, or leave the phase out "
            "by --end-to-end 0"
        )
    check_text(config, model, words=words)


def check_sequences(train: int, processes: int) -> None:
    """Raises DLRError where there are fewer sequences to train on than processes."""
    if train < processes:
        raise DLRError(
            f"{train} sequences of calibration text are fewer than the {processes} processes: give more --tokens, or "
            "start fewer"
        )
