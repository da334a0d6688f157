"""How fast a machine is: this one by a short probe, a GPU that is not here by its data sheet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..common.dtypes import product_dtype
from ..common.machine import device_name
from ..common.micro_batch import MicroBatch
from ..common.options import known_name
from ..common.timing import now
from ..convert.config import Recipe
from ..convert.distill import Gradients, muon_groups, random_init
from ..convert.evaluate import divergence
from ..convert.muon import Muon
from ..convert.outlook.phases import Phase
from ..convert.outlook.steps import step_of
from ..runtime import DLRSpec
from .gpus import GPUS

_PROBED = 12e9  # FLOPs of a probe, about: a fifth of a second of two CPU cores


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine reaches.

    Attributes:
        name: Of the device.
        wide, fit, muon, narrow: FLOPs a second, as `Phase` tells them apart.
        moved: Bytes a second of files that are read and hashed.
        words: Elements of tokens by vocabulary a second, both models' chances and their divergence.
        memory: The device's own, in bytes; None where it is the machine's.
        how: Where these come from, a sentence.
    """

    name: str
    wide: float
    fit: float
    muon: float
    narrow: float
    moved: float
    words: float
    memory: float | None
    how: str

    def seconds(self, phase: Phase) -> float:
        """What a phase takes."""
        parts = (
            (phase.wide, self.wide), (phase.fit, self.fit), (phase.muon, self.muon), (phase.narrow, self.narrow),
            (phase.moved, self.moved), (phase.words, self.words),
        )  # fmt: skip
        return sum(amount / rate for amount, rate in parts)


# Shares of a data sheet that are assumed, not measured: of 16-bit FLOPs in a model's passes and in the smaller products
# of a fit's step (512 tokens by a step's rank are fewer tiles than an H200 has processors), of float32 FLOPs in Muon's.
_HALF, _FIT, _SINGLE = 0.4, 0.25, 0.6


def gpu_rates(name: str) -> Rates:
    """Those of a GPU by its name in `GPUS`. Raises DLRError where there is none of that name."""
    gpu = GPUS[known_name(name, GPUS, "GPU")]
    return Rates(
        gpu.name,
        _HALF * gpu.half,
        _FIT * gpu.half,
        _SINGLE * gpu.single,
        # A token at a time reads all weights: 64 sequences are 64 FLOPs a byte of 16 bits.
        min(_HALF * gpu.half, 64 * 0.6 * gpu.bandwidth),
        1.5e9,
        gpu.bandwidth / 40,
        gpu.memory,
        f"reckoned, not measured: {_HALF:.0%} of the data sheet's 16-bit FLOPs in passes of the model and {_FIT:.0%} "
        f"in fits, {_SINGLE:.0%} of its float32 FLOPs in their optimizer's iteration, 1.5 GB/s for files",
    )


def probe(device: torch.device, spec: DLRSpec, recipe: Recipe, intermediate: int, vocabulary: int) -> Rates:
    """This machine's, by some seconds of what a conversion does most.

    Args:
        device: Where it would run.
        spec: A module's chain; it is cut to as many steps as take a fraction of a second.
        recipe: How it is distilled.
        intermediate: f of the MLPs.
        vocabulary: Tokens of the model's vocabulary.
    """
    d = spec.hidden_size
    slow = torch.float32 if device.type == "cpu" else torch.bfloat16

    def mlp(tokens: int, dtype: torch.dtype) -> Callable[[], Tensor]:
        up, down = (
            torch.randn(*shape, device=device, dtype=dtype)
            for shape in ((intermediate, d), (d, intermediate))
        )
        x = torch.randn(tokens, d, device=device, dtype=dtype)
        return lambda: torch.nn.functional.silu(x @ up.T) @ down.T

    tokens = int(max(64, min(4096, _PROBED / (4 * d * intermediate))))
    wide, narrow = (
        4 * t * d * intermediate / _seconds(mlp(t, dtype), device)
        for t, dtype in ((tokens, product_dtype(device, d)), (min(64, tokens), slow))
    )
    rows = max(1, min(512, 2**24 // vocabulary))
    p, q = (torch.randn(rows, vocabulary, device=device) for _ in "pq")
    words = _seconds(lambda: divergence(p.log_softmax(-1), q.log_softmax(-1)), device)
    block = bytes(2**24)
    hashed = _seconds(lambda: hashlib.sha256(block).digest(), torch.device("cpu"))
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return Rates(
        device_name(device),
        wide,
        *_fit_rates(device, spec, recipe),
        narrow,
        len(block) / hashed,
        2 * rows * vocabulary / words,
        memory,
        "measured here by a short probe, with what else this machine was doing",
    )


def _fit_rates(device: torch.device, spec: DLRSpec, recipe: Recipe) -> tuple[float, float]:
    """FLOPs a second of a distillation's passes, and of its optimizer's iteration."""
    parts = 1 if device.type != "cpu" else torch.get_num_threads()
    recipe = replace(recipe, train_tokens=recipe.batch, seed=0)
    whole = step_of(spec, recipe, parts).flops
    spec = replace(spec, depth=max(1, min(spec.depth, round(spec.depth * _PROBED / whole))))
    counted = step_of(spec, recipe, parts)
    weights = {k: w.to(device) for k, w in random_init(spec, torch.Generator().manual_seed(0)).items()}
    # Without the preconditioner, whose products are taken to be as fast as the passes'.
    optimizer = Muon(muon_groups(weights, recipe, None), momentum=recipe.momentum)
    x, y = (torch.randn(recipe.batch, spec.hidden_size, device=device) for _ in "xy")
    ones = torch.ones(spec.hidden_size, device=device)
    with Gradients(spec, ones, 0 * ones, MicroBatch("the trial of this machine", "token")) as gradients:
        passes = _seconds(lambda: gradients.fill(weights, x, y, len(x)), device)
    return counted.passes / passes, counted.muon / _seconds(optimizer.step, device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the mean of as many as half a second holds, after one."""
    work()
    began, calls = now(device), 0
    while True:
        work()
        calls += 1
        if (passed := now(device) - began) > 0.5:
            return passed / calls
