"""A mixture's chains: one an expert, fitted to the tokens that are routed to it (pairs.py).

Given what goes into a layer and what is missing behind it, experts have nothing to do with one another. Of several
processes that hold a share of the tokens each, every one gets all tokens of the experts that are dealt to it, in the
order that one process has them in, and fits and judges their chains alone; then all get all chains.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from ...common.errors import DLRError
from ...common.progress import Count, shown
from ...reporting.lock_verdict import Redistillation
from ...runtime import DLRExperts, DLRNet, DLRSpec, ExpertsSpec
from ..activations.pairs import Activations
from ..config import ConversionConfig, Recipe
from ..context import Context
from ..distill import distill
from ..evaluate import Fidelity, measure
from ..mlp_matching import MLP
from ..parallel.balance import dealt
from ..parallel.ranks import Ranks
from ..redistill import attack_tokens, redistill
from ..report import ModuleReport
from .pairs import ExpertPairs, ExpertRows, MixturePairs
from .routing import Mixture, named, teacher_of


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
    hands: Sequence[Sequence[int]],
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
    how = "those their router scores highest for" if experts.router is not None else "others drawn at random"
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
