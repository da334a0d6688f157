"""Module-wise distillation: one MLP's input and output on the calibration text into one DLR-Net.

Why it is done this way (SmolLM2's layer 12, 1x36x64, 0.41 M token visits; docs/recipe.md has all that was tried):
x and y in units of their typical size with an output scale of 1 couple the steps strongly, which is what makes
the chain a lock. Small batches fit better (relative error 0.255 at 1024 tokens, 0.239 at 512, 0.230 at 256) but
shrink the flatten gap (0.74, 0.53, 0.48); the reading metric brings it back (1.5) for one percent of the error.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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

_LR = 0.012
_ALIGNED = 0.25  # of the rate, for A and G from an aligned start: at the full rate they diverged
_WARMUP = 0.125  # share of the visits, and at most 150 steps
_DECAY = 0.5  # share of the visits, at the end, over which the rate falls to 0
_METRIC = 0.2  # exponent of the reading metric
_FIRST = 4 / 512  # share of a batch that is drawn from first tokens, beside those that come by chance
_START_B = 0.1  # B starts at a tenth of what would double x
_ROWS = 4096  # tokens at a time while measuring, and to judge the typical size by
_METRIC_TOKENS = 40_000


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and from where to distil: `visits` token visits in batches of `batch` tokens.

    start: 'random', or 'aligned' with the teacher's reading directions (fits better, and is easier to undo).
    Raises DLRError on values that make no sense.
    """

    visits: int
    batch: int = 512
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
    name: str,
    device: torch.device,
    teacher: TeacherWeights | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """Fits a chain to y = mlp(x) and returns DLRNet's tensors in float32 on the CPU.

    The first `tokens` rows of `activations` are trained on. name: the module's, for errors. teacher: the MLP's
    weights, which the aligned start wants. progress is called with (visits done, visits in all).
    Raises DLRError if the fit diverges, and where the MLP's input or output is zero.
    """
    sample = torch.arange(0, tokens, max(1, tokens // _ROWS))
    rms_x, rms_y = (_typical_rms(t) for t in activations.rows(sample))
    if not (rms_x and rms_y):
        side = "output" if rms_x else "input"
        raise DLRError(f"the {side} of {name} is zero for most tokens: leave it out with --layers")
    generator = torch.Generator().manual_seed(recipe.seed)
    weights = _start(spec, recipe, generator, rms_x, teacher)
    weights = {name: w.to(device) for name, w in weights.items()}
    rows = torch.randperm(tokens, generator=generator)[:_METRIC_TOKENS].sort().values
    metric = reading_metric(activations.rows(rows)[0].to(device, torch.float32))
    optimizer = Muon(_groups(weights, recipe.start, metric))
    peaks = [group["lr"] for group in optimizer.param_groups]

    visited = 0
    first = activations.first[:tokens].nonzero()[:, 0]
    with _Gradients(spec, device) as gradients:
        for rows in _batches(tokens, first, recipe, generator):
            x, y = (t.to(device, torch.float32) for t in activations.rows(rows))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * _schedule(visited + len(rows) / 2, recipe)
            gradients.fill(weights, x / rms_x, y / rms_y)
            optimizer.step()
            visited += len(rows)
            progress(visited, recipe.visits)
    if not all(w.isfinite().all() for w in weights.values()):
        raise DLRError(f"the distillation of {name} diverged in {recipe.visits} visits: try another --seed")

    # Back to the scale of the model: z runs on x itself, so A reads x / rms_x and B writes rms_x.
    tensors = {name: w.cpu() for name, w in weights.items()}
    for name in tensors:
        tensors[name] = tensors[name] * rms_x if name == "dlr_B" else tensors[name] / rms_x
    tensors["dlr_scale"] = torch.full((spec.hidden_size,), rms_y / rms_x)
    tensors["dlr_bias"] = torch.zeros(spec.hidden_size)
    return tensors


@torch.no_grad()
def measure(net: DLRNet, x: Tensor, y: Tensor, device: torch.device) -> Fidelity:
    """Compares a chain, with its weights as stored but in float32, with y = mlp(x) on held-out x, y [N, d]."""
    A, B = (w.to(device, torch.float32) for w in (net.dlr_A, net.dlr_B))
    G = None if net.dlr_G is None else net.dlr_G.to(device, torch.float32)
    vectors = net.dlr_scale.to(device), net.dlr_bias.to(device)
    error, gap, update, size = 0.0, 0.0, 0.0, 0.0
    for start in range(0, len(x), _ROWS):
        xb, yb = (t[start : start + _ROWS].to(device, torch.float32) for t in (x, y))
        chain = chain_reference(xb, A, B, *vectors, G, net.spec.act)
        flat = flattened_reference(xb, A, B, *vectors, G, net.spec.act)
        error += _relative_error(chain, yb).sum().item()
        gap += ((flat - chain).square().sum(1) / _size(yb)).sum().item()
        update += lane_updates(xb, A, B, G, net.spec.act).square().mean(0).sum().item()
        size += xb.square().sum().item()
    return Fidelity(error / len(x), gap / len(x), math.sqrt(update / size) if size else 0.0)


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


def reading_metric(x: Tensor) -> Tensor:
    """P^2 [d, d] with P = (C + eps)^-0.2 of mean eigenvalue 1, C the covariance of x [N, d].

    Steps of A and G are orthogonal in this metric, so that they also read the weak directions of x: measured,
    the flatten gap triples (0.49 to 1.86 at an exponent of 0.25) for under 1% of the error.
    """
    values, vectors = torch.linalg.eigh((x.T @ x / len(x)).double())
    power = (values.clamp(min=0) + 1e-3 * values.mean().clamp(min=1e-30)) ** -_METRIC
    power = power / power.mean()
    return ((vectors * power.square()) @ vectors.T).float()


def _groups(weights: dict[str, Tensor], start: str, metric: Tensor) -> list[dict[str, Any]]:
    # The metric wants the rank on the short side; a chain of higher rank than d reads everything anyway.
    reading: dict[str, Any] = {"lr": _LR * (_ALIGNED if start == "aligned" else 1.0)}
    if weights["dlr_A"].shape[-2] <= metric.shape[0]:
        reading["metric"] = metric
    return [{"params": [w], **({"lr": _LR} if name == "dlr_B" else reading)} for name, w in weights.items()]


def _batches(tokens: int, first: Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of tokens, without replacement within an epoch, until the visits are spent.

    A few in each batch are first tokens of their sequences: these carry the massive activations of some layers
    and are rare (one in 512).
    """
    left = recipe.visits
    order = torch.empty(0, dtype=torch.int64)
    while left > 0:
        size = min(recipe.batch, left, tokens)
        extra = math.ceil(size * _FIRST) if len(first) else 0
        if len(order) < size - extra:
            order = torch.randperm(tokens, generator=generator)
        rows, order = order[: size - extra], order[size - extra :]
        left -= size
        yield (
            torch.cat([rows, first[torch.randint(len(first), (extra,), generator=generator)]])
            if extra
            else rows
        )


def _schedule(visited: float, recipe: Recipe) -> float:
    """Share of the peak learning rate after some visits: up, flat, down to 0."""
    done = visited / recipe.visits
    warmup = min(_WARMUP, 150 * recipe.batch / recipe.visits)
    return min(1.0, done / warmup, (1 - done) / _DECAY)


class _Gradients:
    """Gradients of a batch's mean relative error.

    On a CPU every thread takes its own part of the batch, with a chain of its own: at 384 tokens a product takes
    0.2 ms, and two threads inside each of 200 such products lose half their time waiting for one another
    (90 ms a step of 1x36x64 on two cores, 60 ms in this form).
    """

    def __init__(self, spec: DLRSpec, device: torch.device) -> None:
        self._spec = spec
        self._parts = torch.get_num_threads() if device.type == "cpu" else 1
        self._pool = ThreadPoolExecutor(self._parts, initializer=lambda: torch.set_num_threads(1))

    def __enter__(self) -> "_Gradients":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def fill(self, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> None:
        """Sets `.grad` of every weight, for x, y [T, d] at unit scale."""
        jobs = [
            (weights, xp, yp, len(x))
            for xp, yp in zip(x.chunk(self._parts), y.chunk(self._parts), strict=True)
        ]
        run = map if self._parts == 1 else self._pool.map
        parts = list(run(self._of_part, jobs))
        for name, weight in weights.items():
            weight.grad = sum((part[name] for part in parts[1:]), start=parts[0][name])

    def _of_part(self, job: tuple[dict[str, Tensor], Tensor, Tensor, int]) -> dict[str, Tensor]:
        weights, x, y, tokens = job
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        output = lane_updates(x, leaves["dlr_A"], leaves["dlr_B"], leaves.get("dlr_G"), self._spec.act).sum(0)
        (_relative_error(output, y).sum() / tokens).backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def _relative_error(y: Tensor, wanted: Tensor) -> Tensor:
    """|y - wanted|^2 / |wanted|^2 for every token: [T, d], [T, d] -> [T]."""
    return (y - wanted).square().sum(1) / _size(wanted)


def _size(wanted: Tensor) -> Tensor:
    """|wanted|^2 of every token, [T, d] -> [T]; a token without output counts as one of a millionth of the mean."""
    size = wanted.square().sum(1)
    return size.clamp(min=1e-6 * size.mean().clamp(min=1e-30))


def _typical_rms(rows: Tensor) -> float:
    """The median over tokens of their RMS: first tokens' massive activations (469 where the median is below
    1, in layer 1 of SmolLM2) would swamp a mean."""
    return rows.float().square().mean(1).sqrt().median().item()
