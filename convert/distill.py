"""Module-wise distillation: one MLP's input and output on the calibration text into one DLR-Net.

Why it is done this way (SmolLM2's layer 12, 1x36x64, 0.41 M training tokens; docs/experiments/recipe.md has all that
was tried):
x and y in units of their typical size, so that massive rows do not move it, the mean of y in the bias, and an output
scale that couples the steps (_GATED in config.py). Small batches fit better (relative error 0.255 at 1024 tokens, 0.239
at 512, 0.230 at 256) but shrink the flatten gap (0.74, 0.53, 0.48); the preconditioner brings it back (1.5) for one
percent of the error. B at twice the rate makes the gap larger.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..common.dtypes import product_dtype
from ..common.errors import DLRError
from ..common.micro_batch import MicroBatch
from ..common.progress import Count, no_count
from ..common.splits import random_rows
from ..runtime import DLRNet, DLRSpec
from ..triton_kernels import ChainWeights, chain_reference
from .activations.pairs import Activations
from .config import Recipe
from .evaluate import size_of
from .mlp_matching import TeacherWeights
from .muon import Muon, orthogonalising_flops

_RESTARTS = 2  # of a fit that diverges, each at half the rate of the one before
_WATCHES = 32  # times the loss is looked at
_LOOK = 8  # batches between two looks, at least: the loss of one says little
_RISE = 1.5  # a loss so many times the best one seen, and above the zero function's 1, is a fit that diverges
_ROWS = 4096  # tokens to judge the typical size by
_LARGE = 2.0  # times the typical size, from which a token weighs more than others
_WIDE = 64.0  # times the median variance, from which a feature weighs less than others
_FEW = 16.0  # times the median |y|^2, from which a token is none of the usual ones
PRECONDITIONER_TOKENS = 40_000
# Rows that Muon orthogonalises at once. On 1x12x192 whole steps fit 1.2% better at equal training tokens and take 1.5
# times the FLOPs; spent on training tokens these are worth 5%. A student of one wide step keeps whole matrices (in
# blocks SmolLM2's fits worse, docs/experiments/lock-strength.md) unless these take over eight times the FLOPs of the
# passes: with 576 features it is 3.9 and 5.2 times, flat and at random, with 4096 24 and 30.
MUON_ROWS = 64
_WHOLE = 8

Weights = dict[str, Tensor]
Log = Callable[[int, dict[str, float]], None]  # (training tokens done, figures by name)


def distill(
    activations: Activations,
    tokens: int,
    spec: DLRSpec,
    recipe: Recipe,
    *,
    name: str,
    device: torch.device,
    teacher: TeacherWeights | None = None,
    init: Weights | None = None,
    progress: Count = no_count,
    watch: Callable[[int, Weights], None] | None = None,
    log: Log = lambda trained, figures: None,
    note: Callable[[str], object] = lambda sentence: None,
    micro: MicroBatch | None = None,
) -> Weights:
    """Fits a chain to y = mlp(x) and returns DLRNet's tensors in float32 on the CPU.

    A fit whose loss rises or is not a number goes on from its last good state at half the rate, at most twice.

    Args:
        activations: x and y of the MLP, [N, d] each, or a process's share of them.
        tokens: How many of the rows of all, from the first, are trained on.
        spec: The chain.
        recipe: How long, in which steps, from where.
        name: The module's, for errors.
        device: Where it is fitted.
        teacher: The MLP's weights, which the mixed initialisation reads.
        init: Tensors of a chain of this form to start from instead. One step writes what it likes: its output scale is
            brought to the recipe's. What several steps write they read again, so that theirs is kept.
        progress: Called with (training tokens done, in all).
        watch: Called up to 32 times with (training tokens done, the tensors so far).
        log: Called as often with (training tokens done, figures by name): the mean weighted error of the batches since
            the last time, the rate of A and tokens a second.
        note: Called with a sentence each time that the fit diverges and goes on.
        micro: How many tokens of a batch the device takes at once; None to learn it for this fit alone.

    Returns:
        DLRNet's tensors by name.

    Raises:
        DLRError: Where the fit diverges even so, where the MLP's input or output is zero, and where the device's memory
            does not hold one token of a batch.
    """
    share, ranks = activations.share, activations.share.ranks
    sample = share.sample(activations.rows, random_rows(tokens, _ROWS, recipe.seed))
    rms_x = _typical_rms(sample[0])
    y = sample[1].float()
    ordinary = y[usual(y.square().sum(1))]
    bias = ordinary.mean(0) if init is None else init["dlr_bias"].cpu()
    written = y - bias  # by the steps
    rms_y = _typical_rms(written)
    if not (rms_x and rms_y):
        which = "output of {} is the same" if rms_x else "input of {} is zero"
        raise DLRError(f"the {which.format(name)} for most tokens: leave it out with --layers")
    generator = torch.Generator().manual_seed(recipe.seed)
    scale = torch.full((spec.hidden_size,), recipe.scale)
    if init is not None:
        weights = {key: init[key] * rms_x for key in DLRNet.weight_names(spec)}
        if spec.depth == 1:
            weights["dlr_B"] = init["dlr_B"] * init["dlr_scale"] / (recipe.scale * rms_y)
        else:
            weights["dlr_B"] = init["dlr_B"] / rms_x
            scale = init["dlr_scale"].cpu() * (rms_x / rms_y)
    elif recipe.init == "mixed":
        weights = mixed_init(spec, generator, teacher)
    else:
        weights = random_init(spec, generator)
    weights = {key: w.to(device) for key, w in weights.items()}
    ranks.broadcast([*weights.values()])
    read, _ = share.sample(activations.rows, random_rows(tokens, PRECONDITIONER_TOKENS, recipe.seed))
    preconditioner = reading_preconditioner(read.to(device, torch.float32), recipe.preconditioner_exponent)
    # B's steps are as large in the output as they are at the recipe's scale.
    reach = (scale.square().mean().sqrt() / recipe.scale).item()
    preconditioner = preconditioner.to(product_dtype(device, spec.hidden_size))
    groups = muon_groups(weights, recipe, preconditioner, reach)
    optimizer = Muon(groups, momentum=recipe.momentum, ranks=ranks)
    peaks = [group["lr"] for group in optimizer.param_groups]

    def stored() -> Weights:
        # Back to the scale of the model: z runs on x itself, so A reads x / rms_x and B writes rms_x.
        tensors = {key: w.cpu() * (rms_x if key == "dlr_B" else 1 / rms_x) for key, w in weights.items()}
        tensors |= {"dlr_scale": scale * (rms_y / rms_x), "dlr_bias": bias}
        ranks.broadcast([*tensors.values()])
        return tensors

    first = share.first(activations.first, tokens)
    guard = _Guard(recipe, optimizer, weights, name, note)
    trained, seen, began = 0, 0, time.monotonic()
    micro = micro or MicroBatch(f"the distillation of {name}", "token")
    root = feature_weights(ordinary).sqrt()
    unit = (root / _typical_rms(written * root)).to(device)
    with Gradients(spec, scale.to(device) * rms_y * unit, bias.to(device) * unit, micro) as gradients:
        for rows in recipe.batches(tokens, first, generator):
            x, y = (t.to(device, torch.float32) for t in activations.rows(share.mine(rows)))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * guard.share * recipe.schedule(trained + len(rows) / 2)
            loss = gradients.fill(weights, x / rms_x, y * unit, len(rows))
            ranks.add([loss, *(w.grad for w in weights.values() if w.grad is not None)])
            optimizer.step()
            trained += len(rows)
            if (error := guard.look(trained, loss)) is not None:
                rate = optimizer.param_groups[0]["lr"]
                speed = (trained - seen) / max(time.monotonic() - began, 1e-9)
                log(trained, {"training_error": error, "learning_rate": rate, "tokens_per_second": speed})
                if guard.sound and watch is not None:
                    watch(trained, stored())
                seen, began = trained, time.monotonic()
            progress(trained, recipe.train_tokens)
    return stored()


def reading_preconditioner(x: Tensor, exponent: float) -> Tensor:
    """The preconditioner of A and G: P^2 with P = (C + eps)^-exponent of mean eigenvalue 1, C the covariance of x.

    Muon's steps are orthogonal in it, so that they also read the weak directions of x: measured, the flatten gap
    triples (0.49 to 1.86 at an exponent of 0.25) for under 1% of the error.

    Args:
        x: [N, d] float32, inputs of the MLP.
        exponent: From 0, which is none, to 1.

    Returns:
        [d, d] float32.
    """
    values, vectors = torch.linalg.eigh((x.T @ x / len(x)).double())
    power = (values.clamp(min=0) + 1e-3 * values.mean().clamp(min=1e-30)) ** -exponent
    power = power / power.mean()
    return ((vectors * power.square()) @ vectors.T).float()


def muon_groups(
    weights: Weights, recipe: Recipe, preconditioner: Tensor | None, reach: float = 1.0
) -> list[dict[str, Any]]:
    """A chain's weights [L, K, r, d] as Muon takes them, with the recipe's rates and the preconditioner [d, d], if any.

    reach: The output scale over the recipe's, by which B's rate is divided.
    """
    _, depth, rank, d = weights["dlr_A"].shape
    rows = muon_rows(depth, rank, d, recipe.batch)
    # Of a wide step's blocks each is orthogonal by itself, which makes a step sqrt(rank / d) as long as the whole's. At
    # the whole's rate a flat student of layer 12 of SmolLM2 ended at 0.711, at half of it at 0.587, whole at 0.585.
    rate = recipe.rate / (math.sqrt(rank / d) if depth == 1 and rows and rank > d else 1.0)
    common = {"weight_decay": recipe.weight_decay, "rows": rows}
    writing: dict[str, Any] = common | {"lr": rate * recipe.lr_multiplier_b / reach}
    reading: dict[str, Any] = common | {"lr": rate}
    # The preconditioner wants the rank on the short side; a chain of higher rank than d reads everything anyway.
    if rank <= d:
        reading["preconditioner"] = preconditioner
    return [{"params": [w], **(writing if key == "dlr_B" else reading)} for key, w in weights.items()]


def muon_rows(depth: int, rank: int, d: int, batch: int) -> int | None:
    """How many rows of a chain's [rank, d] matrices Muon orthogonalises at once, see MUON_ROWS; None for all."""
    passes = 6 * batch * rank * d
    whole = depth == 1 and orthogonalising_flops(rank, d) <= _WHOLE * passes
    return None if whole else MUON_ROWS


class _Guard:
    """Watches the loss, and takes a fit that diverges back to its last good state, at half the rate."""

    def __init__(
        self, recipe: Recipe, optimizer: Muon, weights: Weights, name: str, note: Callable[[str], object]
    ) -> None:
        self.share = 1.0  # of the recipe's rate
        self.sound = True  # at the last look
        self._note = note
        self._learnt = False
        self._recipe, self._optimizer, self._weights, self._name = recipe, optimizer, weights, name
        self._every = max(_LOOK * recipe.batch, recipe.train_tokens // _WATCHES)
        self._next = self._every
        self._losses: list[Tensor] = []
        self._best: float | None = None
        self._left = _RESTARTS
        self._keep()

    def look(self, trained: int, loss: Tensor) -> float | None:
        """Takes note of a batch's loss; the mean since the last look at one of them, else None."""
        if self._best is None:
            self._best = loss.item()  # of the initialisation
        self._losses.append(loss)
        if trained < min(self._next, self._recipe.train_tokens):
            return None
        self._next = trained + self._every
        mean = torch.stack(self._losses).mean().item()
        self._losses.clear()
        # A finite loss before a step says nothing of the weights after it.
        finite = all(bool(w.isfinite().all()) for w in self._weights.values())
        self.sound = finite and mean <= max(1.0, _RISE * self._best)
        if self.sound:
            self._best = min(mean, self._best)
            self._keep()
            self._learnt = True
            return mean
        ended = trained >= self._recipe.train_tokens and not self._learnt
        if not self._left or ended:
            raise DLRError(
                f"the distillation of {self._name} diverged {_RESTARTS + 1 - self._left} times in "
                f"{self._recipe.train_tokens} training tokens: try another --seed or a larger --batch"
            )
        self._note(
            f"the distillation of {self._name} diverged near training token {trained:,} and went on at half the rate"
        )
        self._left -= 1
        self.share /= 2
        with torch.no_grad():
            for key, weight in self._weights.items():
                weight.copy_(self._good[key])
        self._optimizer.state.clear()  # the momentum led astray
        return mean

    def _keep(self) -> None:
        self._good = {key: w.detach().clone() for key, w in self._weights.items()}


def token_weights(wanted: Tensor) -> Tensor:
    """What each token's squared error weighs in a fit: that of the relative error, times the root of its size.

    The size counts from twice the typical one, so that nearly all tokens have the weight of the relative error. Of one
    757 times as large, as layer 11 of SmolLM2 writes at first tokens, the gradient of the relative error is 757 times
    smaller than an ordinary token's, and the fit never learns it: after 51,200 training tokens its first tokens have a
    relative error of 0.98, with this weight of 0.0005, at 0.258 over all tokens instead of 0.253.

    Args:
        wanted: [T, d] float32, in units of its typical size: all tokens of a batch, see `size_of`.

    Returns:
        [T] float32.
    """
    size = wanted.square().mean(1).sqrt()
    return size.div(_LARGE).clamp(min=1).sqrt() / size_of(wanted)


def usual(size: Tensor) -> Tensor:
    """[N] bool, which tokens of |y|^2 [N] are no massive ones: such tokens are few, and chains learn them apart."""
    return size <= _FEW * size.median()


def feature_weights(y: Tensor) -> Tensor:
    """What each feature's squared error weighs in a fit: 1, and less where its variance is beyond 64 times the median.

    A few features may hold nearly all of an MLP's output and little of what the model makes of it: three have 96% of
    what the last MLP of all-MiniLM-L6-v2 writes, for the normalisation behind it to shrink
    (docs/experiments/recipe.md, "Mean and wide features").

    Args:
        y: [N, d], outputs of an MLP at usual tokens.

    Returns:
        [d] float32.
    """
    variance = y.float().var(0, correction=0)
    alive = variance[variance > 0]
    return (_WIDE * alive.median() / variance).clamp(max=1) if len(alive) else torch.ones_like(variance)


class Gradients:
    """Gradients of a batch's mean weighted error, from products in bfloat16 where the device is faster at these.

    On a CPU every thread takes its own part of the batch, with a chain of its own: at 384 tokens a product takes
    0.2 ms, and two threads inside each of 200 such products lose half their time waiting for one another
    (90 ms a step of 1x36x64 on two cores, 60 ms in this form).
    """

    def __init__(self, spec: DLRSpec, scale: Tensor, bias: Tensor, micro: MicroBatch) -> None:
        self._spec, self._scale, self._bias, self._micro = spec, scale, bias, micro
        self._products = product_dtype(scale.device, spec.hidden_size)
        self._parts = torch.get_num_threads() if scale.device.type == "cpu" else 1
        self._pool = ThreadPoolExecutor(self._parts, initializer=lambda: torch.set_num_threads(1))

    def __enter__(self) -> "Gradients":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def fill(self, weights: Weights, x: Tensor, y: Tensor, tokens: int) -> Tensor:
        """Sets `.grad` of every weight, for x, y [T, d] at unit scale, and returns the loss, a scalar tensor: their
        sums over these tokens, divided by `tokens`, the batch's."""
        weight_of_each = token_weights(y)

        def of_all(at_once: int) -> Tensor:
            for weight in weights.values():
                weight.grad = None
            jobs = [
                (weights, *part, tokens)
                for part in zip(*(t.split(at_once) for t in (x, y, weight_of_each)), strict=True)
            ]
            losses = []
            for loss, gradients in (map if self._parts == 1 else self._pool.map)(self._of_part, jobs):
                losses.append(loss)
                for key, weight in weights.items():
                    weight.grad = gradients[key] if weight.grad is None else weight.grad.add_(gradients[key])
            return torch.stack(losses).sum()

        return self._micro.fit(of_all, max(1, math.ceil(len(x) / self._parts)))

    def _of_part(self, job: tuple[Weights, Tensor, Tensor, Tensor, int]) -> tuple[Tensor, Weights]:
        weights, x, y, weight, tokens = job
        leaves = {key: w.detach().requires_grad_() for key, w in weights.items()}
        chain = ChainWeights(
            leaves["dlr_A"], leaves["dlr_B"], self._scale, self._bias, leaves.get("dlr_G"), self._spec.act
        )
        y_hat = chain_reference(x, chain.in_products(self._products))
        loss = ((y_hat - y).square().sum(1) * weight).sum() / tokens
        loss.backward()
        return loss.detach(), {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}


def _typical_rms(rows: Tensor) -> float:
    """The median over tokens of their RMS: first tokens' massive activations (469 where the median is below
    1, in layer 1 of SmolLM2) would swamp a mean."""
    return rows.float().square().mean(1).sqrt().median().item()


_B = 0.1  # B starts at a tenth of what would double x
_NOTHING = 1e-6  # of the longest sum: what is shorter reads nothing, as do pruned units


def random_init(spec: DLRSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """A chain's weights at random: A, G ~ N(0, 1/d), so that pre-activations have unit RMS; B ~ 0.1 N(0, 1/(K r))."""
    weights = {
        name: torch.randn(spec.weight_shape, generator=generator) / math.sqrt(spec.hidden_size)
        for name in DLRNet.weight_names(spec)
    }
    weights["dlr_B"] = torch.randn(spec.weight_shape, generator=generator) * (
        _B / math.sqrt(spec.depth * spec.rank)
    )
    return weights


def mixed_init(
    spec: DLRSpec, generator: torch.Generator, teacher: TeacherWeights | None
) -> dict[str, Tensor]:
    """A random initialisation whose A and G read sums and differences of what the teacher reads, of norm 1, in any
    order.

    Of a gated MLP those of a unit's gate g and up u, for g u = ((g + u)^2 - (g - u)^2) / 4, and silu(z) is
    z / 2 + z^2 / 4 around 0. Of an MLP without a gate those of two units drawn at random. B starts at random, so the
    steps are as strongly coupled as ever (docs/experiments/recipe.md: the flatten gap, the attacks, and what the rows
    give away).
    A chain with more rows than there are such sums keeps random ones; without the teacher's weights all are.
    """
    weights = random_init(spec, generator)
    if teacher is None:
        return weights
    sums = _sums(teacher, generator)
    for name in weights:
        if name != "dlr_B":
            rows = weights[name].view(-1, spec.hidden_size)
            order = torch.randperm(len(rows), generator=generator)[: len(sums)]
            signs = torch.randint(2, (len(order), 1), generator=generator) * 2 - 1
            rows[order] = sums[: len(order)] * signs
    return weights


def _sums(teacher: TeacherWeights, generator: torch.Generator) -> Tensor:
    """[n, d] of norm 1: pair by pair, in random order, the sum and the difference; of pruned units neither."""
    up = teacher.up.cpu()
    if teacher.gate is None:
        other = up.roll(int(torch.randint(1, max(2, len(up)), (), generator=generator)), 0)
    else:
        other = teacher.gate.cpu()
    pairs = torch.stack([other + up, other - up], dim=1)
    sums = pairs[torch.randperm(len(pairs), generator=generator)].flatten(0, 1)
    sums = sums / sums.abs().max().clamp(min=1e-30)  # for the squares of large ones
    sizes = sums.norm(dim=1, keepdim=True)
    alive = (sizes > _NOTHING * sizes.max())[:, 0]
    return sums[alive] / sizes[alive]
