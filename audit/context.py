"""What all attacks of one audit work with, in one object."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common.progress import Count, Phase, Progress, expect, no_progress
from ..common.resume import ResumeStore
from ..convert.mlp_matching import MLP
from .chains import Chain, chains_of
from .reference import Reference
from .texts import Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .config import AuditConfig


@dataclass(frozen=True, eq=False)
class ModelVariant:
    """A model to be fine-tuned.

    Attributes:
        name: Such as 'original', 'locked' or 'redistilled, 0.25'.
        model: The model, on the device where it is trained.
        mlps: Names of the modules in the MLPs' places.
        locked: Those of them that are in the places of locked MLPs, whatever stands there in this model.
        deep: Whether they are chains of several steps, which strategies of their own serve.
    """

    name: str
    model: PreTrainedModel
    mlps: Sequence[str]
    locked: Sequence[str]
    deep: bool = False


@dataclass(slots=True)
class AuditContext:
    """One audit's inputs and its surroundings.

    Attributes:
        locked: The locked model, in eval mode, float32, on the device; no attack leaves a trace in it.
        original: The model that was locked, likewise.
        mlps: The original's MLPs that are locked, in model order.
        slots: Names of the modules that are, or make up, any MLP, locked or not.
        neutral: Text to distil chains back on, and to measure fidelity on.
        task: Text to fine-tune on.
        config: Every choice, resolved.
        scratch: A folder for what does not fit into memory.
        across: 'sequential' or 'independent': how the modules were converted.
        conversion: Training tokens of each module's conversion, a mixture's over its experts a token; None, or missing,
            where the checkpoint does not say.
        resume: Finished parts of an interrupted audit; None where nothing is kept.
        progress: Called with (what is being done, done, total).
        notes: What was not run, and what else the owner should know, a sentence each; parts add to it.
        runs_begun, runs_at_most: Fine-tuning runs so far, and how many there will be, for the progress.
        runs_kept: Those of them that an interrupted audit made.
        chains: The chains that are distilled back, by name.
        rates: By attack, the best rate of the last model that was fine-tuned: where the next one's sweep begins.
        reference: The original on the held-out neutral text, which attacked models are compared with.
    """

    locked: PreTrainedModel
    original: PreTrainedModel
    mlps: list[MLP]
    slots: list[str]
    neutral: Text
    task: Text
    config: AuditConfig
    scratch: Path
    across: str = "sequential"
    conversion: Mapping[str, int | None] = field(default_factory=dict)
    resume: ResumeStore | None = None
    progress: Progress = no_progress
    notes: list[str] = field(default_factory=list)
    runs_begun: int = 0
    runs_at_most: int = 0
    runs_kept: int = 0
    rates: dict[str, float] = field(default_factory=dict)
    chains: dict[str, Chain] = field(init=False)
    reference: Reference = field(init=False)

    def __post_init__(self) -> None:
        self.chains = {chain.name: chain for chain in chains_of(self.mlps, self.locked)}
        self.reference = Reference(self.original, self.neutral.heldout)

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return torch.device(str(self.config.device))

    @property
    def step_shape(self) -> tuple[int, int]:
        """Sequences of a fine-tuning step, and tokens of each."""
        length = self.task.train.shape[1]
        return self.config.plan.sequences(length), length

    def count(self, what: str) -> Count:
        """The progress of one thing."""
        return partial(self.progress, what)

    def expect_runs(self) -> None:
        """Tells the progress how many fine-tuning runs there will be at most, as is known now.

        Work is in tokens that pass a layer; a training token counts as three.
        """
        plan, layers = self.config.plan, len(self.slots)
        each = layers * (3 * plan.tokens + plan.looks * self.task.heldout.numel())
        runs = max(0, self.runs_at_most - self.runs_kept)
        expect(self.progress, [Phase("run ", float(runs * each), runs)])

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """A finished part of the audit.

        Args:
            name: The part's, different from all others'.
            make: Gives the part in plain values, fit for JSON; not called where an interrupted audit made it.

        Returns:
            The values as JSON gives them back: with lists for tuples.
        """
        found = self.resume.get(name) if self.resume is not None else None
        if found is not None:
            return found[1]["value"]
        value = make()
        if self.resume is not None:
            self.resume.put(name, {}, {"value": value})
        return json.loads(json.dumps(value))
