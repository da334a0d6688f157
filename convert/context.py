"""What all parts of a conversion work with, in one object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.micro_batch import MicroBatch
from ..common.progress import Count, Progress
from ..common.resume import ResumeStore
from ..common.scalars import Scalars, no_scalars
from ..runtime import DLRNet
from .activations.calibrator import SequentialCalibrator
from .activations.capture import capture
from .activations.dealt import capture_dealt
from .activations.pairs import Activations
from .config import ConversionConfig
from .data import CalibrationText
from .evaluate import Evaluation, Fidelity, StateEvaluation, measure
from .layer_runner import Unrepeatable
from .mlp_matching import MLP
from .parallel.ranks import ALONE, Ranks
from .parallel.share import Share
from .source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .outlook.amounts import Amounts
    from .outlook.sensitivity import Foretold


@dataclass(slots=True)
class Context:
    """One conversion's inputs and its surroundings.

    Attributes:
        source: The original, in eval mode, on the device.
        mlps: The MLPs that are converted, in model order.
        text: Calibration text in the model's tokens.
        config: Every choice, resolved.
        stored: The dtype of the checkpoint's weights.
        resume: Finished parts of an interrupted run.
        scratch: A folder for what does not fit into memory.
        progress: Called with (what is being done, done, total).
        notes: What the owner should know, a sentence each; parts add to it.
        amounts: What the work was reckoned to be; None where that was not asked.
        scalars: Takes figures for a log.
        ranks: The processes that do this together.
        micro_batches: What the device takes at once, by the kind of work.
        foretold: What the lock will cost the model; None where that was not asked.
    """

    source: Source
    mlps: list[MLP]
    text: CalibrationText
    config: ConversionConfig
    stored: torch.dtype
    resume: ResumeStore
    scratch: Path
    progress: Progress
    notes: list[str] = field(default_factory=list)
    amounts: Amounts | None = None
    scalars: Scalars = no_scalars
    ranks: Ranks = ALONE
    micro_batches: dict[str, MicroBatch] = field(default_factory=dict)
    foretold: Foretold | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The original."""
        return self.source.model

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return torch.device(str(self.config.device))

    @property
    def tokens(self) -> Tensor:
        """All calibration text, [S, n] int64: what is trained on, then what is held out."""
        return torch.cat([self.text.train, self.text.heldout])

    @property
    def train_rows(self) -> int:
        """How many tokens of `tokens`, from the first, are trained on."""
        return self.text.train.numel()

    @property
    def identity(self) -> list[str]:
        """Modules that chains replace besides their MLPs' own."""
        return [name for mlp in self.mlps for name in mlp.identity]

    def count(self, what: str) -> Count:
        """The progress of one thing."""
        return partial(self.progress, what)

    def micro_batch(self, what: str, unit: str) -> MicroBatch:
        """How much of one kind of work the device takes at once, for all of it in this run; see `MicroBatch`."""
        return self.micro_batches.setdefault(what, MicroBatch(what, unit))

    @property
    def device_notes(self) -> list[str]:
        """What the device's memory did not hold at once, a sentence each."""
        return [micro.note for micro in self.micro_batches.values() if micro.note]

    def log_of(self, mlp: MLP) -> Callable[[int, Mapping[str, float | None]], None]:
        """Takes figures by name of one module at a step; those that are None were not measured. A figure is a group of
        the log, with a tag for each module, in the order of the layers."""

        def put(step: int, figures: Mapping[str, float | None]) -> None:
            for name, value in figures.items():
                if value is not None:
                    self.scalars(f"{name}/{mlp.layer:03}-{mlp.module}", value, step)

        return put

    def log_end_to_end(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes figures by name of all chains' training together."""
        for name, value in figures.items():
            self.scalars(f"end-to-end/{name}", value, step)

    def log_model(self, evaluation: Evaluation | StateEvaluation, step: int) -> None:
        """Takes what was measured of the locked model after so many training tokens of all chains together."""
        for name, value in evaluation.to_dict().items():
            if value is not None and name != "tokens":
                self.scalars(f"model/{name}", float(value), step)

    def capture(self, mlps: Sequence[MLP], share: Share | None = None) -> Iterator[tuple[MLP, Activations]]:
        """The original's activations at each of `mlps`, one after the other, on the whole text or a share of it; see
        `activations.capture`."""
        tokens = self.tokens if share is None else share.tokens
        for mlp, pairs in capture(self.model, mlps, tokens, **self._room):
            if share is not None:
                pairs.share = share
            yield mlp, pairs

    def capture_dealt(self, hands: Sequence[Sequence[MLP]]) -> Iterator[tuple[MLP, Activations]]:
        """The original's activations, on the whole text, at each of the modules that are dealt to this process; all
        processes must go through it to its end.

        hands: Each process's modules, the same in every process.
        """
        if self.ranks.size == 1:
            return self.capture(hands[0])
        return capture_dealt(self.model, hands, self.tokens, self.ranks, **self._room)

    def share(self) -> Share:
        """What of the text is this process's, where it is spread over all."""
        return Share(self.ranks, self.text.train, self.text.heldout)

    def fidelity(self, net: DLRNet, pairs: Activations) -> Fidelity:
        """What a chain makes of the held-out rows of its module's activations."""
        held = pairs.share.held(self.train_rows, len(pairs))
        micro = self.micro_batch("the measuring of modules", "token")
        return measure(net, *pairs.rows(held), self.device, pairs.first[held], pairs.share.ranks, micro)

    def calibrator(self) -> SequentialCalibrator:
        """Both models' hidden states in front of the first layer, of this process's share of the text.

        Raises:
            Unrepeatable: In all processes, where it is in one; see `SequentialCalibrator`.
        """
        share, made, why = self.share(), None, ""
        try:
            made = SequentialCalibrator(self.model, self.mlps, share.tokens, share=share, **self._room)
        except Unrepeatable as error:
            why = str(error)
        if whys := [words for words in self.ranks.gathered(why) if words]:
            raise Unrepeatable(whys[0])
        assert made is not None
        return made

    @property
    def room(self) -> int:
        """Bytes of memory for this process's activations."""
        return int(self.config.max_memory or 0) // self.ranks.local_size

    @property
    def _room(self) -> dict[str, Any]:
        """Where activations are kept, and who hears of it."""
        return {
            "max_memory": self.room,
            "scratch": self.scratch,
            "progress": self.count("activations"),
            "micro": self.micro_batch("the reading of activations", "sequence"),
        }
