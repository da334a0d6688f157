"""A mixture's chains: one an expert, fitted to the tokens that are routed to it.

An expert's chain gets what the router of the locked model gives its expert. Its target is what the expert makes of
that and, where modules correct one another, its share of what is still missing: with delta what the mixture should
give less what its experts would give, and w_j the weights of a token's experts, expert e is to give
w_e / sum_j w_j^2 * delta more, the smallest changes that add up to delta.

Given what goes in and delta, experts have nothing to do with one another. Of several processes that hold a share of the
tokens each, every one gets all tokens of the experts that are dealt to it, in the order that one process has them in,
and fits and judges their chains alone; then all get all chains.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...common.errors import DLRError
from ...common.progress import Count, shown
from ...common.weights import drop_pages, storage
from ...reporting.lock_verdict import Redistillation
from ...runtime import DLRExperts, DLRNet, DLRSpec, ExpertsSpec
from ...runtime.experts import one_expert
from ..activations import Activations
from ..config import ConversionConfig, Recipe
from ..context import Context
from ..distill import distill
from ..evaluate import Fidelity, measure
from ..mlp_matching import MLP
from ..parallel.balance import dealt
from ..parallel.ranks import Ranks
from ..parallel.share import Pair
from ..redistill import attack_tokens, redistill
from ..report import ModuleReport
from .routing import Mixture, Routing, named, router_of, teacher_of, together

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 4096  # tokens at a time


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Which tokens one expert's chain is fitted to, by their numbers among those of all processes.

    Attributes:
        expert: Its number.
        rows: [n] int64, training text first, then held-out text.
        weight: [n] float32, what the router multiplies the expert's output with; 0 where it did not choose it.
        train: How many are trained on.
        routed: How many of these the router gave the expert.
    """

    expert: int
    rows: Tensor
    weight: Tensor
    train: int
    routed: int

    @property
    def held(self) -> int:
        """How many are held out."""
        return len(self.rows) - self.train


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
        pairs: What goes into it, what should come out, and the routing, of all tokens or of a process's share; y is
            overwritten where it is corrected.
        train_rows: How many of the tokens of all processes, from the first, are trained on.
        corrected: Whether what should come out is more than what the experts give.

    Attributes:
        routing: Of the tokens of all processes.
    """

    def __init__(
        self, model: PreTrainedModel, mixture: Mixture, pairs: Activations, train_rows: int, corrected: bool
    ) -> None:
        assert pairs.routing is not None
        self.mixture, self.pairs = mixture, pairs
        self.routing = Routing(*(pairs.share.whole(part) for part in pairs.routing))
        self._first = pairs.share.whole(pairs.first.float()).bool()
        self._train_rows, self._device = train_rows, model.device
        self._experts = model.get_submodule(mixture.module)
        self._router = router_of(model, mixture)
        self._corrected = corrected
        self._received: dict[int, Pair] = {}  # what experts get, and delta there, by their numbers
        self._scratch: Path | None = None  # where that lies; None where it is in memory
        if corrected:  # y becomes delta
            for begin in range(0, len(pairs), _ROWS):
                rows = slice(begin, begin + _ROWS)
                x = self._on_device(pairs.x[rows])
                part = Routing(*(p[rows].to(self._device) for p in pairs.routing))
                pairs.y[rows] -= together(self._experts, mixture.experts, x, part).cpu().to(pairs.y.dtype)

    def of(self, expert: int, least: int = 0) -> ExpertPairs:
        """One expert's pairs, where all tokens are here. least: as for `rows_of`."""
        return self.pairs_of(self.rows_of(expert, least))

    def rows_of(self, expert: int, least: int = 0) -> ExpertRows:
        """One expert's tokens. least: training tokens that it gets at least, of the nearest tokens where the router
        gave it fewer. All processes must ask for the same."""
        rows, weight = self.routing.of(expert)
        trained = rows < self._train_rows
        routed = int(trained.sum())
        near = self._nearest(expert, rows, least - routed)
        rows = torch.cat([rows[trained], near, rows[~trained]])
        weight = torch.cat([weight[trained], torch.zeros(len(near)), weight[~trained]])
        return ExpertRows(expert, rows, weight, routed + len(near), routed)

    def deal(self, hands: Sequence[Sequence[ExpertRows]], room: int, scratch: Path) -> None:
        """Each process gets all that it fits its own experts to.

        Args:
            hands: Each process's experts, the same in every process.
            room: Bytes that this process may hold of activations, those of both streams and `pairs` included.
            scratch: The folder of what is beyond.
        """
        share, d = self.pairs.share, self.mixture.hidden_size
        wanted = [torch.cat([one.rows for one in hand] or [torch.arange(0)]) for hand in hands]
        count = len(wanted[share.ranks.rank])
        # 12 bytes an element of the tokens that are here, see `SequentialCalibrator`, and 4 of these.
        self._scratch = scratch if count and d * (12 * len(self.pairs) + 4 * count) > room else None
        x, missing = (storage(count, d, self.pairs.x.dtype, self._scratch) for _ in "xy")
        for at, part in share.sent(self.pairs.rows, wanted):
            x[at], missing[at] = part
            if self._scratch is not None:
                drop_pages(x)
                drop_pages(missing)
        sizes = [len(one.rows) for one in hands[share.ranks.rank]]
        parts = zip(x.split(sizes), missing.split(sizes), strict=True)
        self._received = {one.expert: pair for one, pair in zip(hands[share.ranks.rank], parts, strict=True)}

    def pairs_of(self, own: ExpertRows) -> ExpertPairs:
        """What one expert's chain is fitted to, once: of several processes by the one that the expert is dealt to."""
        here = own.expert in self._received
        x, y = self._received.pop(own.expert) if here else self._copied(own.rows)
        for begin in range(0, len(x), _ROWS):
            at = slice(begin, begin + _ROWS)
            wanted = one_expert(self._experts, own.expert, self._on_device(x[at])).cpu().to(y.dtype)
            if self._corrected:
                squares = self.routing.weight[own.rows[at]].square().sum(1).clamp(min=1e-12)
                wanted += ((own.weight[at] / squares)[:, None] * y[at].float()).to(y.dtype)
            y[at] = wanted
        mapped = self._scratch is not None
        return ExpertPairs(
            Activations(x, y, self._first[own.rows], mapped, self._scratch), own.train, own.routed
        )

    def _copied(self, rows: Tensor) -> Pair:
        x, y = (torch.empty(len(rows), self.mixture.hidden_size, dtype=self.pairs.x.dtype) for _ in "xy")
        for begin in range(0, len(rows), _ROWS):
            at = slice(begin, begin + _ROWS)
            x[at] = self.pairs.x[rows[at]]
            if self._corrected:
                y[at] = self.pairs.y[rows[at]]
        return x, y

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
        share = self.pairs.share
        owner, places = share.places(others)
        lead = torch.zeros(len(others))
        k = self.routing.chosen.shape[1]
        for here in (owner == share.ranks.rank).nonzero()[:, 0].split(_ROWS):
            scores = self.pairs.x[places[here]].float() @ self._router.float().cpu().T
            lead[here] = scores[:, expert] - scores.topk(k, 1).values[:, -1]
        share.ranks.add([lead])  # zeros elsewhere: the sums are exact
        return others[lead.argsort(descending=True)[:count]].sort().values

    def _on_device(self, x: Tensor) -> Tensor:
        return x.to(self._device, next(self._experts.parameters()).dtype)


def check_sizes(config: ConversionConfig, mlps: Sequence[MLP]) -> None:
    """Raises DLRError where the choices make no chain for an MLP, or an expert."""
    for mlp in mlps:
        config.spec_for(mlp.hidden_size, mlp.expert_params if isinstance(mlp, Mixture) else mlp.params)
        if isinstance(mlp, Mixture) and config.lanes > 1:
            raise DLRError(f"{mlp.module} is a mixture, whose experts get one lane each: leave --lanes out")


@dataclass(frozen=True, slots=True)
class _Fitted:
    """What became of one expert's chain: figures, whether its expert's weights were known, notes."""

    fidelity: Fidelity
    known: bool
    notes: list[str]


def fit_mixture(
    context: Context, mixture: Mixture, pairs: Activations, title: str, corrected: bool
) -> tuple[DLRExperts, ModuleReport]:
    """The chains of a mixture and what was measured of them, the same in all processes that have a share of `pairs`.

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
    config, ranks = context.config, pairs.share.ranks
    experts = MixturePairs(context.model, mixture, pairs, context.train_rows, corrected)
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
    rows = {expert: experts.rows_of(expert, least) for expert in spec.chained}
    # As many times through its tokens as a dense module goes through all.
    recipes = {
        e: replace(
            recipe,
            train_tokens=max(recipe.batch, round(recipe.train_tokens * own.train / context.train_rows)),
            seed=recipe.seed + mixture.layer * mixture.experts + e,
        )
        for e, own in rows.items()
    }
    # Chains of one shape take FLOPs as they take training tokens.
    jobs = dealt([float(recipes[e].train_tokens) for e in spec.chained], ranks.size)
    hands = [[spec.chained[job] for job in hand] for hand in jobs]
    if ranks.size > 1:
        experts.deal([[rows[e] for e in hand] for hand in hands], context.room, context.scratch)
    nets: dict[int, DLRNet] = {}
    found: dict[int, _Fitted] = {}
    weakest: tuple[int, DLRNet, ExpertPairs] | None = None  # of this process's, for the attack
    for number, expert in enumerate(hands[ranks.rank], 1):
        own = experts.pairs_of(rows[expert])
        progress = context.count(f"distilling {title}, expert {number} of {len(hands[ranks.rank])}, {chain}")
        nets[expert], found[expert] = _fit_expert(
            context, mixture, expert, own, chain, recipes[expert], progress
        )
        if config.redistill and expert == _weakest(found, rows):
            weakest = expert, nets[expert], own
    if ranks.size > 1:
        context.progress("waiting for the other processes", 0, 1)
        found = {e: one for part in ranks.gathered(found) for e, one in part.items()}
        _spread(ranks, hands, nets, chain, context.stored)
    fitted = [found[e] for e in spec.chained]
    chains = DLRExperts(spec, module if kept else None, dtype=context.stored)
    weights = {
        name: torch.stack([nets[e].state_dict()[name].reshape(p.shape[1:]) for e in spec.chained])
        for name, p in chains.named_parameters()
        if not name.startswith("dlr_kept")
    }
    chains.assign(weights | {n: p for n, p in chains.named_parameters() if n.startswith("dlr_kept")})
    said = [note for one in fitted for note in one.notes] + _notes(mixture, spec, starved, least, experts)
    if recipe.init == "mixed" and not all(one.known for one in fitted):
        said.append(
            f"how {mixture.module} keeps its weights is unknown: its chains started at random, which fits worse"
        )
    fidelity = _together([(rows[e].held, found[e].fidelity) for e in spec.chained])
    report = ModuleReport(
        mixture.module, mixture.layer, spec, len(spec.chained) * mixture.expert_params, fidelity,
        sum(recipes[e].train_tokens for e in spec.chained), time.monotonic() - started, notes=tuple(said),
    )  # fmt: skip
    if not config.redistill or (attacked := _weakest(found, rows)) is None:
        return chains, report

    def attack() -> ModuleReport:
        assert weakest is not None and weakest[0] == attacked
        return _attacked(context, report, *weakest, recipes[attacked], title)

    owner = next(rank for rank, hand in enumerate(hands) if attacked in hand)
    waits = owner != ranks.rank
    with shown(context.progress, f"redistilling {title}, expert {attacked}") if waits else nullcontext():
        return chains, ranks.agreed(attack, by=owner)


def _fit_expert(
    context: Context,
    mixture: Mixture,
    expert: int,
    own: ExpertPairs,
    chain: DLRSpec,
    recipe: Recipe,
    progress: Count,
) -> tuple[DLRNet, _Fitted]:
    module, notes = context.model.get_submodule(mixture.module), list[str]()
    teacher = teacher_of(module, expert) if recipe.init == "mixed" else None
    tensors = distill(
        own.pairs, own.train, chain, recipe, name=f"expert {expert} of {mixture.module}", device=context.device,
        teacher=teacher, progress=progress, note=notes.append,
        micro=context.micro_batch("the distillation of experts", "token"),
    )  # fmt: skip
    net = DLRNet(chain, dtype=context.stored)
    net.assign(tensors)
    held = torch.arange(own.train, len(own.pairs))
    judged = held if len(held) else torch.arange(own.train)
    micro = context.micro_batch("the measuring of modules", "token")
    fidelity = measure(net, *own.pairs.rows(judged), context.device, own.pairs.first[judged], micro=micro)
    return net, _Fitted(fidelity, teacher is not None, notes)


def _weakest(found: dict[int, _Fitted], rows: dict[int, ExpertRows]) -> int | None:
    """The expert of the smallest flatten gap, of those with tokens to judge the attack by; None where none has any."""
    judged = [expert for expert in found if rows[expert].held]
    return min(judged, key=lambda expert: (found[expert].fidelity.flatten_gap, expert), default=None)


def _spread(
    ranks: Ranks,
    hands: Sequence[Collection[int]],
    nets: dict[int, DLRNet],
    chain: DLRSpec,
    dtype: torch.dtype,
) -> None:
    """`nets` gets the chains that other processes fitted, by their experts, one after the other."""
    for owner, hand in enumerate(hands):
        for expert in hand:
            net = nets.setdefault(expert, DLRNet(chain, dtype=dtype))
            vectors = [net.dlr_scale.data, net.dlr_bias.data]
            ranks.broadcast([getattr(net, name).data for name in net.weight_names(chain)], by=owner)
            ranks.broadcast(vectors, by=owner)


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
