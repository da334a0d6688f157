"""The end-to-end phase: all chains at once, against what the original says at the end of the model.

Modules fitted one at a time leave errors that only the whole model shows. Here the loss is taken where the
model's users look: KL(original || locked) of the next token, or, in a model without a language-model head,
|locked - original|^2 / |original|^2 of the last hidden states. Only the chains learn.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..common.dtypes import fast_products, product_dtype
from ..common.errors import DLRError
from ..common.hooks import removed, run_body, text_inputs
from ..common.micro_batch import MicroBatch
from ..common.progress import Count, no_count
from ..reporting.lock_verdict import LOCKED_GAP, Redistillation
from ..runtime import DLRExperts, DLRNet
from ..runtime.quantizer import replace_module
from ..triton_kernels import backend, chain_reference, flattened_reference
from .context import Context
from .distill import Log, muon_rows
from .evaluate import (
    BATCH,
    Evaluation,
    MeanDivergence,
    StateEvaluation,
    compare,
    distance_of,
    predicts_next,
    relative_error,
    sequences_at_once,
    vocabulary,
)
from .muon import Muon
from .parallel.ranks import ALONE, Ranks
from .redistill import attack_module
from .report import EndToEndReport, Modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class EndToEndPlan:
    """How the phase trains.

    Attributes:
        train_tokens: Training tokens in all.
        batch: About so many of them a step, in whole sequences; None for what makes 256 steps, from 512 to 8,192.
        rate: Muon's at its peak, where x is of unit size and `start` is 1, and goes with the root of that, as a step
            does that takes a share of the errors away. Peaks that were tried, SmolLM2 in batches of 512: from a KL
            of 1.66, 8,192 tokens led to 1.59 at 0.00003, 1.49 at 0.0001, 1.48 at 0.0002, 2.78 at 0.001; from 0.0806,
            32,768 led to 0.0795 at 0.000035, 0.0797 at 0.00007, 0.0808 at 0.00015, and from a loss gap of 0.0230 to
            0.0180 and 0.0164 at the first two. Of hidden states none was tried.
        start: How far the locked model is from the original before the phase, see `distance`.
        momentum: Muon's.
        seed: Of the order of the text.
    """

    train_tokens: int
    batch: int | None = None
    rate: float = 0.00015
    start: float = 1.0
    momentum: float = 0.9
    seed: int = 0

    @property
    def step_tokens(self) -> int:
        """Training tokens of a step, about."""
        return self.batch or max(_STEP[0], min(_STEP[1], self.train_tokens // _STEPS))

    def passes(self, length: int, vocabulary: int, there: int | None = None) -> tuple[int, int]:
        """How many sequences of `length` tokens go through the model at once, and how often in a step. there: how many
        there are, where that is known."""
        most = self.step_tokens // length
        at_once = sequences_at_once(length, vocabulary, most if there is None else min(most, there))
        return at_once, max(1, round(self.step_tokens / (length * at_once)))

    @property
    def peak(self) -> float:
        """The rate at its peak."""
        return self.rate * math.sqrt(self.start)


_STEP, _STEPS = (512, 8192), 256


class TrainableChain(DLRNet):
    """A chain as its owner, or an attacker, trains it: the reference with float32 parameters."""

    def __init__(self, net: DLRNet, device: torch.device) -> None:
        super().__init__(net.spec, dtype=torch.float32, device=device)
        self.assign(dict(net.named_parameters()))
        self._products = product_dtype(device, net.spec.hidden_size)
        for name in self.weight_names(self.spec):
            self.get_parameter(name).requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        return chain_reference(x.float(), self.chain.in_products(self._products)).to(x.dtype)

    def groups(self, plan: EndToEndPlan) -> list[dict[str, Any]]:
        """What Muon trains, at a rate that means the same whatever the size of x: rows of A that read x have the size
        of 1 / x, nearly as they started, and B writes in x's units."""
        spec, rate = self.spec, plan.peak
        rows = muon_rows(spec.depth, spec.rank, spec.hidden_size, plan.step_tokens)
        unit = 1 / self.dlr_A.detach().norm(dim=-1).median().clamp(min=1e-30).item()
        return [
            {
                "params": [self.get_parameter(name)],
                "lr": rate * (unit if name == "dlr_B" else 1 / unit),
                "rows": rows,
            }
            for name in self.weight_names(spec)
        ]


def train_end_to_end(
    model: PreTrainedModel,
    chains: Mapping[str, DLRNet | DLRExperts],
    identity: list[str],
    tokens: Tensor,
    plan: EndToEndPlan,
    *,
    progress: Count = no_count,
    watch: Callable[[int, float, PreTrainedModel], None] | None = None,
    log: Log = lambda trained, figures: None,
    ranks: Ranks = ALONE,
    micro: MicroBatch | None = None,
) -> dict[str, DLRNet | DLRExperts]:
    """Trains all chains at once, in their places in the model; those of experts are in their places, too, and stay.

    Args:
        model: The original, which is left as it is.
        chains: Module name to chain.
        identity: Modules that chains replace besides their MLPs' own.
        tokens: [S, n] int64, the text.
        plan: How long and how fast.
        progress: Called with (training tokens done, in all).
        watch: Called after every batch with (training tokens done, its loss, the locked model as it is by then).
        log: Called as often with (training tokens done, figures by name): the loss, the rate and tokens a second.
        ranks: The processes that do this together, each with its part of every step's sequences.
        micro: How many sequences the device takes at once; None to learn it here.

    Returns:
        New chains, in the dtype of the old, on the CPU.

    Raises:
        DLRError: Where the loss is not finite, and where the device's memory does not hold one sequence.
    """
    places = {
        name: TrainableChain(net, model.device) if isinstance(net, DLRNet) else net
        for name, net in chains.items()
    }
    student = with_chains(model, places, identity)
    groups = [
        group
        for place in places.values()
        if isinstance(place, TrainableChain)
        for group in place.groups(plan)
    ]
    optimizer = Muon(groups, momentum=plan.momentum, ranks=ranks)
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(plan.seed)
    sequences, n = tokens.shape
    at_once, parts = plan.passes(n, vocabulary(model), sequences)
    order = torch.empty(0, dtype=torch.int64)
    steps = max(1, math.ceil(plan.train_tokens / (n * at_once * parts)))
    micro = micro or MicroBatch("the end-to-end phase", "sequence")
    began = time.monotonic()

    def fill(mine: Tensor, together: int) -> float:
        """The gradients and the loss of this process's sequences of a step, so many at a time."""
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in mine.split(together) if len(mine) else ():
            with backend("naive"):  # gradients go through experts' chains, too
                loss = distance(student, model, tokens[part].to(model.device))
                loss = loss / (parts * at_once / len(part))  # the mean over all processes' sequences
                loss.backward()
            total += loss.item()
        return total

    for step in range(steps):
        done = (step + 0.5) / steps
        share = min(1.0, (step + 1) / max(1, steps // 10), 2 * (1 - done))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        drawn = []
        for _ in range(parts):
            if len(order) < at_once:
                order = torch.randperm(sequences, generator=generator)
            drawn.append(order[:at_once])
            order = order[at_once:]
        mine = torch.cat(drawn)[ranks.rank :: ranks.size]
        (total,) = ranks.total(micro.fit(partial(fill, mine), at_once))
        for group in optimizer.param_groups:  # one at a time: all gradients twice would be much memory
            ranks.add([_gradient(weight) for weight in group["params"]])
        if not math.isfinite(total):
            raise DLRError("the end-to-end phase diverged: try a lower rate")
        optimizer.step()
        trained = (step + 1) * parts * at_once * n
        progress(min(trained, plan.train_tokens), plan.train_tokens)
        if watch is not None:
            watch(trained, total, student)
        speed = parts * at_once * n / max(time.monotonic() - began, 1e-9)
        rate = plan.peak * share
        log(trained, {"training_loss": total, "learning_rate": rate, "tokens_per_second": speed})
        began = time.monotonic()
    return {
        name: _stored(place, net) if isinstance(place := places[name], TrainableChain) else net
        for name, net in chains.items()
    }


def _gradient(weight: Tensor) -> Tensor:
    """A weight's gradient, zeros where this process had no sequence of the step."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def distance(student: nn.Module, original: PreTrainedModel, ids: Tensor) -> Tensor:
    """How far a locked model is from its original on a text, with its gradients.

    Args:
        student: The model with chains.
        original: What it is to be like.
        ids: [b, n] int64.

    Returns:
        A scalar: the mean KL of the next token's distribution, or the mean relative error of the last hidden states.
    """
    with fast_products(original.device, original.config.get_text_config().hidden_size):
        with torch.no_grad():
            wanted = _output(original, ids)
        got = _output(student, ids)
    if not predicts_next(original):
        return relative_error(got, wanted).mean()
    return cast(Tensor, MeanDivergence.apply(wanted, got))


def _output(model: Any, ids: Tensor) -> Tensor:
    """Logits [T, V], or last hidden states [T, d], in float32."""
    states = model(**text_inputs(model, ids)).logits if predicts_next(model) else run_body(model, ids)[0]
    return states.float().flatten(0, 1)


def with_chains(model: PreTrainedModel, chains: Mapping[str, Any], identity: list[str]) -> PreTrainedModel:
    """A copy of a model with chains in their places; all other weights are the model's own tensors, not copies.

    Args:
        model: The original, or a locked model.
        chains: Module name to what takes its place.
        identity: Modules that become nn.Identity.
    """
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    student = copy.deepcopy(model, memo=shared)
    for name, chain in chains.items():
        # on the model's device; a chain that is there already stays the very module, for it is being trained
        here = (
            chain
            if next(chain.parameters()).device == model.device
            else copy.deepcopy(chain).to(model.device)
        )
        replace_module(student, name, here)
    for name in identity:
        replace_module(student, name, nn.Identity())
    return student


@torch.no_grad()
def flatten_gaps(
    model: PreTrainedModel, chains: Mapping[str, DLRNet], tokens: Tensor, batch: int = BATCH
) -> dict[str, float]:
    """The flatten gap of each chain in a locked model, over |chain|^2, on the model's own activations.

    Args:
        model: The locked model.
        chains: Its chains by module name.
        tokens: [S, n] int64.
        batch: Sequences in a pass.

    Returns:
        Module name to the mean over tokens of |flattened - chain|^2 / |chain|^2.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in chains}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].float().flatten(0, -2)
            chain = chains[name].chain.to(x.device, torch.float32)
            seen[name].append(relative_error(flattened_reference(x, chain), chain_reference(x, chain)))

        return keep

    with removed([model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in chains]):
        for ids in tokens.split(batch):
            run_body(model, ids)
    return {name: torch.cat(parts).mean().item() for name, parts in seen.items()}


def _dense(chains: Mapping[str, DLRNet | DLRExperts]) -> dict[str, DLRNet]:
    return {name: net for name, net in chains.items() if isinstance(net, DLRNet)}


def _stored(place: TrainableChain, net: DLRNet | DLRExperts) -> DLRNet:
    trained = DLRNet(place.spec, dtype=net.dlr_A.dtype)
    trained.assign({name: weight.detach().cpu() for name, weight in place.named_parameters()})
    return trained


_KEPT_GAP = 0.95  # share of the smallest flatten gap that the phase must leave
_KEPT_ERROR = 0.9  # share of the error that an attacker's student has against the chain


def run_end_to_end(context: Context, modules: Modules) -> EndToEndReport | None:
    """The phase that the configuration asks for, measured before and after: it changes modules.chains.

    None where none was asked for, and where it was dropped because it failed or made the lock weaker, which is noted.
    """
    if not context.config.end_to_end:
        return None
    if not _dense(modules.chains):
        context.notes.append("there was no end-to-end phase, for it trains no experts' chains")
        return None
    started = time.monotonic()
    model, text = context.model, context.text
    modules.chains = dict(modules.chains)  # all of them are in work from here on

    def figures(what: str) -> tuple[Evaluation | StateEvaluation, dict[str, float]]:
        def look() -> tuple[Evaluation | StateEvaluation, dict[str, float]]:
            locked = with_chains(model, modules.chains, context.identity)
            micro = context.micro_batch("the measuring of the model", "sequence")
            evaluation = compare(locked, model, text.heldout, context.count(f"measuring {what}"), micro=micro)
            gaps = partial(flatten_gaps, locked, _dense(modules.chains), text.heldout)
            return evaluation, micro.fit(gaps, BATCH)

        return context.ranks.agreed(look)

    before, fitted = figures("the modules"), modules.chains
    context.log_model(before[0], 0)
    try:
        modules.chains = train_end_to_end(
            model,
            fitted,
            context.identity,
            text.unseen(context.config.end_to_end),
            EndToEndPlan(context.config.end_to_end, start=distance_of(before[0]), seed=context.config.seed),
            progress=context.count("end-to-end phase"),
            log=context.log_end_to_end,
            ranks=context.ranks,
            micro=context.micro_batch("the end-to-end phase", "sequence"),
        )
        after = figures("the end-to-end phase")
    except DLRError as error:
        modules.chains = fitted
        context.notes.append(f"the end-to-end phase was dropped: {error}")
        return None
    weakest = min(after[1], key=lambda name: after[1][name])
    done = EndToEndReport(
        context.config.end_to_end,
        time.monotonic() - started,
        before[0],
        after[0],
        min(before[1].values()),
        min(after[1].values()),
        weakest,
    )
    weaker = _unlocked(before[1], after[1]) or _weaker(done)
    if not weaker and context.config.redistill:
        try:
            attacks = _attacked(context, modules, weakest, _dense(fitted)[weakest])
        except DLRError as error:  # it says nothing of the chains
            context.notes.append(f"the attack on {weakest} after the end-to-end phase failed: {error}")
        else:
            done = replace(done, redistillation_before=attacks[0], redistillation_after=attacks[1])
            weaker = _weaker(done)
    if weaker:
        modules.chains = fitted
        context.notes.append(f"the end-to-end phase was dropped, for it {weaker}")
        return None
    if (attack := done.redistillation_after) and attack.undone:  # the verdict is on the chain that is written
        modules.reports = [
            replace(report, redistillation=attack) if report.module == weakest else report
            for report in modules.reports
        ]
    return done


def _attacked(
    context: Context, modules: Modules, name: str, fitted: DLRNet
) -> tuple[Redistillation, Redistillation]:
    """The attack on one module's chain before and after the phase, on the original's activations."""
    mlp = next(mlp for mlp in context.mlps if mlp.module == name)
    report = next(report for report in modules.reports if report.module == name)
    done = []
    for _, pairs in context.capture([mlp], context.share()):
        for when, net in {"before": fitted, "after": _dense(modules.chains)[name]}.items():
            progress = context.count(f"redistilling {name}, as it was {when} the end-to-end phase")
            done.append(attack_module(context, net, report, pairs, progress))
    before, after = done
    return before, after


def _unlocked(before: dict[str, float], after: dict[str, float]) -> str | None:
    """The module that the phase unlocked, by the flatten gaps of all; None where it unlocked none."""
    for name, gap in before.items():
        if gap >= LOCKED_GAP and not after[name] >= LOCKED_GAP:
            return f"unlocked {name}: its flatten gap was {gap:.3f}, then {after[name]:.3f}"
    return None


def _weaker(done: EndToEndReport) -> str | None:
    """What the phase made worse; None where it is to be kept."""
    t = done
    distances = distance_of(t.evaluation_before), distance_of(t.evaluation_after)
    if distances[1] > distances[0]:
        return f"led away from the original: distance {distances[0]:.4f}, then {distances[1]:.4f}"
    if not t.smallest_gap_after >= _KEPT_GAP * t.smallest_gap_before:
        return (
            f"lowered the smallest flatten gap: {t.smallest_gap_before:.3f}, then {t.smallest_gap_after:.3f}"
        )
    attacks = t.redistillation_before, t.redistillation_after
    # Of a chain that was undone before, students' errors are what chance left.
    if attacks[0] and attacks[1] and not attacks[0].undone:
        before, after = attacks[0].student_error, attacks[1].student_error
        if attacks[1].undone or after < _KEPT_ERROR * before:
            return f"made {t.weakest} easier to undo: a student's error was {before:.4f}, then {after:.4f}"
    return None
