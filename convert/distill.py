"""Module-wise distillation: one MLP's input and output on the calibration text into one DLR-Net.

Why it is done this way: x and y at unit RMS with an output scale of 1 couple the chain's steps strongly (the
sum of the updates is about as large as x), which is what makes it a lock; Muon and the unit RMS together are
worth a factor of 1.6 in error; see docs/recipe.md for what else was tried.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime import DLRError, DLRNet, DLRSpec
from ..triton_kernels import chain_reference, flattened_reference, lane_updates
from .capture import Activations
from .mlps import TeacherWeights
from .muon import Muon

LOCKED_GAP = 0.5  # a chain whose flatten gap is below is not locked: flattening undoes it
STARTS = ("random", "aligned")

_LR = 0.01
_LR_ALIGNED = 0.003  # of A and G from an aligned start, which diverged for one seed of two at 0.01
_WARMUP = 0.125  # share of the visits
_DECAY = 0.5  # share of the visits, at the end, over which the rate falls to 0
_START_B = 0.1  # B starts at a tenth of what would double x
_ROWS = 4096  # tokens at a time while measuring


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and from where to distil: `visits` token visits in batches of `batch` tokens.

    start: 'random', or 'aligned' with the teacher's reading directions (fits better, and is easier to undo).
    Raises DLRError on values that make no sense.
    """

    visits: int
    batch: int = 1024
    start: str = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise DLRError(f"unknown start {self.start!r}; one of {', '.join(STARTS)}")
        if self.batch < 1 or self.visits < self.batch:
            raise DLRError(f"{self.visits} visits are not even one batch of {self.batch} tokens")


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How one locked module does on held-out tokens.

    rel_error: mean over tokens of |chain - mlp|^2 / |mlp|^2. flatten_gap: the same distance between the chain
    and its flattened self, over |mlp|^2. coupling: RMS of the lanes' updates over RMS of x.
    """

    rel_error: float
    flatten_gap: float
    coupling: float

    @property
    def locked(self) -> bool:
        """Whether the flatten gap is large enough to call this a lock."""
        return self.flatten_gap >= LOCKED_GAP

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "locked": self.locked}


def distill(
    activations: Activations,
    tokens: int,
    spec: DLRSpec,
    recipe: Recipe,
    *,
    device: torch.device,
    teacher: TeacherWeights | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """Fits a chain to y = mlp(x) and returns DLRNet's tensors in float32 on the CPU.

    The first `tokens` rows of `activations` are trained on. teacher: the MLP's weights, which the aligned
    start wants. progress is called with (visits done, visits in all). Raises DLRError if the fit diverges.
    """
    sample = torch.arange(0, tokens, max(1, tokens // _ROWS))
    rms_x, rms_y = (_typical_rms(t) for t in activations.rows(sample))
    generator = torch.Generator().manual_seed(recipe.seed)
    weights = _start(spec, recipe, generator, rms_x, teacher)
    weights = {name: w.to(device).requires_grad_() for name, w in weights.items()}
    optimizer = Muon(_groups(weights, recipe.start), lr=_LR)
    peaks = [group["lr"] for group in optimizer.param_groups]

    visited = 0
    for rows in _batches(tokens, recipe, generator):
        x, y = (t.to(device, torch.float32) for t in activations.rows(rows))
        x, y = x / rms_x, y / rms_y
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * _schedule((visited + len(rows) / 2) / recipe.visits)
        loss = _relative_error(_output(x, weights, spec), y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        visited += len(rows)
        progress(visited, recipe.visits)
    if not all(w.isfinite().all() for w in weights.values()):
        raise DLRError(
            f"the distillation diverged in {recipe.visits} visits from seed {recipe.seed}: try another --seed"
        )

    # Back to the scale of the model: z runs on x itself, so A reads x / rms_x and B writes rms_x.
    tensors = {name: w.detach().cpu() for name, w in weights.items()}
    for name in tensors:
        tensors[name] = tensors[name] * rms_x if name == "dlr_B" else tensors[name] / rms_x
    tensors["dlr_scale"] = torch.full((spec.hidden_size,), rms_y / rms_x)
    tensors["dlr_bias"] = torch.zeros(spec.hidden_size)
    return tensors


@torch.no_grad()
def measure(net: DLRNet, x: Tensor, y: Tensor, device: torch.device) -> Fidelity:
    """Compares a chain, with its weights as stored but in float32, with y = mlp(x) on held-out x, y [N, d]."""
    weights = [None if w is None else w.to(device, torch.float32) for w in (net.dlr_A, net.dlr_B, net.dlr_G)]
    A, B, G = weights
    vectors = net.dlr_scale.to(device), net.dlr_bias.to(device)
    error, gap, update, size = 0.0, 0.0, 0.0, 0.0
    for start in range(0, len(x), _ROWS):
        xb, yb = (t[start : start + _ROWS].to(device, torch.float32) for t in (x, y))
        chain = chain_reference(xb, A, B, *vectors, G, net.spec.act)
        flat = flattened_reference(xb, A, B, *vectors, G, net.spec.act)
        error += _relative_error(chain, yb).sum().item()
        gap += ((flat - chain).square().sum(1) / yb.square().sum(1).clamp(min=1e-30)).sum().item()
        update += lane_updates(xb, A, B, G, net.spec.act).square().mean(0).sum().item()
        size += xb.square().sum().item()
    return Fidelity(error / len(x), gap / len(x), math.sqrt(update / size))


def _start(
    spec: DLRSpec, recipe: Recipe, generator: torch.Generator, rms_x: float, teacher: TeacherWeights | None
) -> dict[str, Tensor]:
    """The weights before the first step, for x at unit RMS."""
    d = spec.hidden_size

    def draw(std: float) -> Tensor:
        return torch.randn(spec.weight_shape, generator=generator) * std

    weights = {name: draw(1 / math.sqrt(d)) for name in DLRNet.weight_names(spec)}
    weights["dlr_B"] = draw(_START_B / math.sqrt(spec.depth * spec.rank))
    if recipe.start == "aligned":
        if teacher is None:
            raise DLRError("the aligned start needs the teacher's weights")
        # Rows run over the steps in the MLP's order; a chain with more rows than the MLP keeps random ones.
        if spec.gated:
            reads = {"dlr_A": teacher.up, "dlr_G": teacher.gate}
        else:
            reads = {"dlr_A": teacher.up if teacher.gate is None else torch.cat([teacher.gate, teacher.up])}
        for name, rows in reads.items():
            if rows is None:
                raise DLRError("an aligned start with gated steps needs a gated MLP")
            flat = weights[name].view(-1, d)
            count = min(len(rows), len(flat))
            flat[:count] = rows[:count].cpu().float() * rms_x
    return weights


def _groups(weights: dict[str, Tensor], start: str) -> list[dict[str, Any]]:
    reading = _LR_ALIGNED if start == "aligned" else _LR
    return [{"params": [w], "lr": _LR if name == "dlr_B" else reading} for name, w in weights.items()]


def _batches(tokens: int, recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of tokens, without replacement within an epoch, until the visits are spent."""
    left = recipe.visits
    order = torch.empty(0, dtype=torch.int64)
    while left > 0:
        size = min(recipe.batch, left, tokens)
        if len(order) < size:
            order = torch.randperm(tokens, generator=generator)
        rows, order = order[:size], order[size:]
        left -= size
        yield rows


def _schedule(done: float) -> float:
    """Share of the peak learning rate after a share `done` of the visits: up, flat, down to 0."""
    return min(1.0, done / _WARMUP, (1 - done) / _DECAY)


def _output(x: Tensor, weights: dict[str, Tensor], spec: DLRSpec) -> Tensor:
    return lane_updates(x, weights["dlr_A"], weights["dlr_B"], weights.get("dlr_G"), spec.act).sum(0)


def _relative_error(y: Tensor, wanted: Tensor) -> Tensor:
    """|y - wanted|^2 / |wanted|^2 for every token: [T, d], [T, d] -> [T]."""
    return (y - wanted).square().sum(1) / wanted.square().sum(1).clamp(min=1e-30)


def _typical_rms(rows: Tensor) -> float:
    """The median over tokens of their RMS: first tokens' massive activations (469 where the median is below
    1, in layer 1 of SmolLM2) would swamp a mean."""
    rms = rows.float().square().mean(1).sqrt().median().item()
    return rms if rms > 0 else 1.0
