"""A mixture's chains: one an expert, fitted to the tokens that are routed to it.

An expert's chain gets what the router of the locked model gives its expert. Its target is what the expert makes of
that and, where modules correct one another, its share of what is still missing: with delta what the mixture should
give less what its experts would give, and w_j the weights of a token's experts, expert e is to give
w_e / sum_j w_j^2 * delta more, the smallest changes that add up to delta.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...common.errors import DLRError
from ...reporting.lock_verdict import Redistillation
from ...runtime import DLRExperts, DLRNet, ExpertsSpec
from ...runtime.experts import one_expert
from ..activations import Activations
from ..config import ConversionConfig, Recipe
from ..context import Context
from ..distill import distill
from ..evaluate import Fidelity, measure
from ..mlp_matching import MLP
from ..redistill import attack_tokens, redistill
from ..report import ModuleReport
from .routing import Mixture, Routing, named, router_of, teacher_of, together

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 4096  # tokens at a time


@dataclass(frozen=True, slots=True)
class ExpertPairs:
    """What one expert's chain is fitted to.

    Attributes:
        pairs: x, y [n, d]: training text first, then held-out text.
        train: How many rows are trained on.
        routed: How many of these the router gave the expert.
    """

    pairs: Activations
    train: int
    routed: int


class MixturePairs:
    """What the chains of one mixture are fitted to.

    Args:
        model: Whose experts they are fitted to: the original, or a locked model for chains to be distilled back.
        mixture: The mixture.
        pairs: What goes into it, what should come out, and the routing; y is overwritten where it is corrected.
        train_rows: How many of the tokens, from the first, are trained on.
        corrected: Whether what should come out is more than what the experts give.
    """

    def __init__(
        self, model: PreTrainedModel, mixture: Mixture, pairs: Activations, train_rows: int, corrected: bool
    ) -> None:
        assert pairs.routing is not None
        self.mixture, self.pairs = mixture, pairs
        self.routing: Routing = pairs.routing
        self._train_rows, self._device = train_rows, model.device
        self._experts = model.get_submodule(mixture.module)
        self._router = router_of(model, mixture)
        self._missing = pairs.y if corrected else None  # delta
        if corrected:
            for begin in range(0, len(pairs), _ROWS):
                rows = slice(begin, begin + _ROWS)
                x = self._on_device(pairs.x[rows])
                part = Routing(*(p[rows].to(self._device) for p in self.routing))
                pairs.y[rows] -= together(self._experts, mixture.experts, x, part).cpu().to(pairs.y.dtype)

    def of(self, expert: int, least: int = 0) -> ExpertPairs:
        """One expert's pairs. least: training tokens that it gets at least, of the nearest tokens where the router gave
        it fewer."""
        rows, weight = self.routing.of(expert)
        trained = rows < self._train_rows
        routed = int(trained.sum())
        near = self._nearest(expert, rows, least - routed)
        rows = torch.cat([rows[trained], near, rows[~trained]])
        weight = torch.cat([weight[trained], torch.zeros(len(near)), weight[~trained]])
        x, y = (torch.empty(len(rows), self.mixture.hidden_size, dtype=self.pairs.x.dtype) for _ in "xy")
        for begin in range(0, len(rows), _ROWS):
            at = slice(begin, begin + _ROWS)
            x[at] = self.pairs.x[rows[at]]
            y[at] = one_expert(self._experts, expert, self._on_device(x[at])).cpu().to(y.dtype)
            if self._missing is not None:
                squares = self.routing.weight[rows[at]].square().sum(1).clamp(min=1e-12)
                y[at] += ((weight[at] / squares)[:, None] * self._missing[rows[at]].float()).to(y.dtype)
        return ExpertPairs(Activations(x, y, self.pairs.first[rows], False), routed + len(near), routed)

    def tokens_of(self, expert: int) -> int:
        """Training tokens that the router gave an expert."""
        rows, _ = self.routing.of(expert)
        return int((rows < self._train_rows).sum())

    def _nearest(self, expert: int, rows: Tensor, count: int) -> Tensor:
        """Training tokens that are not the expert's and that its router's score is highest for, [count] at most; by the
        lead of the token's last expert over it where all scores are known, else drawn at random."""
        free = torch.ones(self._train_rows, dtype=torch.bool)
        free[rows[rows < len(free)]] = False
        others = free.nonzero()[:, 0]
        if count <= 0 or not len(others):
            return others[:0]
        if self._router is None:
            generator = torch.Generator().manual_seed(expert)
            return others[torch.randperm(len(others), generator=generator)[:count]].sort().values
        lead = torch.empty(len(others))
        k = self.routing.chosen.shape[1]
        for begin in range(0, len(others), _ROWS):
            at = slice(begin, begin + _ROWS)
            scores = self.pairs.x[others[at]].float() @ self._router.float().cpu().T
            lead[at] = scores[:, expert] - scores.topk(k, 1).values[:, -1]
        return others[lead.argsort(descending=True)[:count]].sort().values

    def _on_device(self, x: Tensor) -> Tensor:
        return x.to(self._device, next(self._experts.parameters()).dtype)


def check_sizes(config: ConversionConfig, mlps: Sequence[MLP]) -> None:
    """Raises DLRError where the choices make no chain for an MLP, or an expert."""
    for mlp in mlps:
        config.spec_for(mlp.hidden_size, mlp.expert_params if isinstance(mlp, Mixture) else mlp.params)
        if isinstance(mlp, Mixture) and config.lanes > 1:
            raise DLRError(f"{mlp.module} is a mixture, whose experts get one lane each: leave --lanes out")


def fit_mixture(
    context: Context, mixture: Mixture, pairs: Activations, title: str, corrected: bool
) -> tuple[DLRExperts, ModuleReport]:
    """The chains of a mixture and what was measured of them.

    The relative error is the mean over experts by their held-out tokens, flatten gap and coupling are those of the
    expert with the smallest.

    Args:
        context: The conversion.
        mixture: The mixture.
        pairs: What goes in, what should come out, and the routing.
        title: What the progress calls it.
        corrected: Whether modules correct one another here.

    Raises:
        DLRError: As `distill` does, where no expert gets enough tokens and they are to stay as they are, and where they
            cannot be taken out of this mixture.
    """
    started = time.monotonic()
    config, experts = (
        context.config,
        MixturePairs(context.model, mixture, pairs, context.train_rows, corrected),
    )
    least = min(config.expert_tokens or 0, context.train_rows)
    starved = [e for e in range(mixture.experts) if experts.tokens_of(e) < least]
    kept = tuple(starved) if config.starved == "leave" else ()
    if len(kept) == mixture.experts:
        raise DLRError(
            f"no expert of {mixture.module} gets {least:,} tokens: give more text, a smaller --expert-tokens, or "
            "--starved nearest"
        )
    module = context.model.get_submodule(mixture.module)
    if kept and any(p.shape[0] != mixture.experts for p in module.parameters()):
        raise DLRError(
            f"experts of {mixture.module} cannot be left as they are one by one: use --starved nearest"
        )
    chain = config.spec_for(mixture.hidden_size, mixture.expert_params)
    spec = ExpertsSpec(chain, mixture.experts, kept)
    recipe = config.recipe(gated=mixture.gated)
    nets: list[DLRNet] = []
    found: list[tuple[int, Fidelity]] = []  # held-out tokens, figures
    attacks: dict[int, tuple[DLRNet, ExpertPairs, Recipe]] = {}
    notes: list[str] = []
    unknown = spent = 0
    for number, expert in enumerate(spec.chained, 1):
        own = experts.of(expert, least)
        # As many times through its tokens as a dense module goes through all.
        share = max(recipe.batch, round(recipe.train_tokens * own.train / context.train_rows))
        mine = replace(
            recipe, train_tokens=share, seed=recipe.seed + mixture.layer * mixture.experts + expert
        )
        teacher = teacher_of(module, expert) if recipe.init == "mixed" else None
        unknown += teacher is None
        spent += share
        tensors = distill(
            own.pairs, own.train, chain, mine, name=f"expert {expert} of {mixture.module}", device=context.device,
            teacher=teacher, note=notes.append, micro=context.micro_batch("the distillation of experts", "token"),
            progress=context.count(f"distilling {title}, expert {number} of {len(spec.chained)}, {chain}"),
        )  # fmt: skip
        net = DLRNet(chain, dtype=context.stored)
        net.assign(tensors)
        held = torch.arange(own.train, len(own.pairs))
        judged = held if len(held) else torch.arange(own.train)
        micro = context.micro_batch("the measuring of modules", "token")
        fidelity = measure(net, *own.pairs.rows(judged), context.device, own.pairs.first[judged], micro=micro)
        nets.append(net)
        found.append((len(held), fidelity))
        if config.redistill and fidelity.flatten_gap == min(f.flatten_gap for _, f in found) and len(held):
            attacks = {expert: (net, own, mine)}
    chains = DLRExperts(spec, module if kept else None, dtype=context.stored)
    tensors = {
        name: torch.stack([net.state_dict()[name].reshape(p.shape[1:]) for net in nets])
        for name, p in chains.named_parameters()
        if not name.startswith("dlr_kept")
    }
    chains.assign(tensors | {n: p for n, p in chains.named_parameters() if n.startswith("dlr_kept")})
    notes += _notes(mixture, spec, starved, least, experts)
    if unknown and recipe.init == "mixed":
        notes.append(
            f"how {mixture.module} keeps its weights is unknown: its chains started at random, which fits worse"
        )
    report = ModuleReport(
        mixture.module, mixture.layer, spec, len(spec.chained) * mixture.expert_params, _together(found), spent,
        time.monotonic() - started, notes=tuple(notes),
    )  # fmt: skip
    for expert, (net, own, mine) in attacks.items():
        report = _attacked(context, report, expert, net, own, mine, title)
    return chains, report


def _together(found: list[tuple[int, Fidelity]]) -> Fidelity:
    weights = [held for held, _ in found] if any(held for held, _ in found) else [1] * len(found)
    first = [f.first_error for _, f in found if f.first_error is not None]
    return Fidelity(
        sum(w * f.rel_error for w, (_, f) in zip(weights, found, strict=True)) / sum(weights),
        min(f.flatten_gap for _, f in found),
        min(f.coupling for _, f in found),
        max(first, default=None),
    )


def _notes(
    mixture: Mixture, spec: ExpertsSpec, starved: list[int], least: int, experts: MixturePairs
) -> list[str]:
    if not starved:
        return []
    what = f"{len(starved)} of {mixture.experts} experts of {mixture.module} got fewer than {least:,} tokens"
    if spec.kept:
        return [f"{what} and stay as they are, as trainable as before: {named(starved)}"]
    how = "those their router scores highest for" if experts._router is not None else "others drawn at random"
    return [f"{what} and were fitted on {how}, too: {named(starved)}"]


def _attacked(
    context: Context,
    report: ModuleReport,
    expert: int,
    net: DLRNet,
    own: ExpertPairs,
    recipe: Recipe,
    title: str,
) -> ModuleReport:
    """The report with the attack on the expert of the smallest flatten gap; a note where the attack failed."""
    share = context.config.redistill or 0.0
    try:
        done: Redistillation = redistill(
            net.float(), own.pairs, own.train, train_tokens=attack_tokens(share, recipe.train_tokens),
            conversion=recipe.train_tokens, name=f"expert {expert} of {report.module}", device=context.device,
            seed=recipe.seed, progress=context.count(f"redistilling {title}, expert {expert}"),
            micro=context.micro_batch("the attack on modules", "token"),
        )  # fmt: skip
    except DLRError as error:
        return replace(report, notes=(*report.notes, f"the attack on {report.module} failed: {error}"))
    note = f"the attack on {report.module} was on expert {expert}, whose flatten gap is the smallest"
    return replace(report, redistillation=done, notes=(*report.notes, note))
