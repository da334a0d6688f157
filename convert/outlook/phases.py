"""What the phases of a conversion compute and hold: FLOPs and bytes, counted without a number of the model.

A plan is made of them, and so is the time that a conversion still takes. All but the steps of a fit, which
`steps.py` counts, is products of known sizes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ...common import progress
from ...reporting.words import seconds_words
from ...runtime import DLRSpec
from ..activations.calibrator import SequentialCalibrator
from ..activations.capture import BATCH_TOKENS
from ..config import Recipe
from ..distill import PRECONDITIONER_TOKENS
from ..end_to_end import EndToEndPlan
from ..evaluate import predicts_next
from ..mlp_discovery import automatic
from ..mlp_matching import MLP
from ..parallel.balance import dealt
from ..redistill import FIT_TOKENS, INITS, half_of, regression_flops
from ..writing import SHARD
from .amounts import Amounts, Chains
from .sensitivity import AT_ONCE, foretelling_tokens, measured, why_unknown
from .steps import step_of


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a conversion.

    Attributes:
        name: As the progress calls it.
        wide: FLOPs of products with thousands of tokens.
        fit: FLOPs of a fit's steps but for its optimizer's iteration, in the dtype that a device multiplies fastest.
        muon: FLOPs of that iteration, in float32.
        narrow: FLOPs of products with the tokens of a few sequences' next position.
        moved: Bytes of weight files that are read, written or hashed.
        words: Elements of tokens by vocabulary whose chances are worked out.
        host, device: Bytes held at the peak, in the machine's memory (without the program itself) and the GPU's.
        disk: Bytes of files that are there during the phase.
        sent: Bytes that a process sends to the others, whose time is not reckoned.
    """

    name: str
    wide: float = 0.0
    fit: float = 0.0
    muon: float = 0.0
    narrow: float = 0.0
    moved: float = 0.0
    words: float = 0.0
    host: float = 0.0
    device: float = 0.0
    disk: float = 0.0
    sent: float = 0.0

    @property
    def flops(self) -> float:
        """All of them."""
        return self.wide + self.fit + self.muon + self.narrow


# In FLOPs of wide products that take as long: a byte of files and an element of chances as the probe of a plan finds
# them on a core of an EPYC (79 GFLOP/s in wide products, 82 in fits, 26 in their optimizer, 1.8 GB/s, 0.13e9
# elements/s), and a FLOP of a fit and of its optimizer on a GPU as a plan reckons an H100. They weigh what has not
# begun; what has is timed.
_BYTE, _WORD = 44.0, 610.0
_FIT_AND_MUON = {"cpu": (1.0, 3.0), "gpu": (1.6, 10.0)}

_OWN_SIZE = 0.1  # a chain's parameters over its MLP's, less 1
_FORETELLING = 0.03  # the share of the other phases up to which what layers cost is foretold unasked


def phases(a: Amounts) -> list[Phase]:
    """The phases of a conversion, in their order.

    On a CPU everything is in the machine's memory; on a GPU the model, a fit and the logits are in its own.

    Of several processes these are one's, but for the disk, which is all's: where modules are dealt out the busiest's,
    else the first one's, which has the most of what is divided and does alone what is not.
    """
    mine = a.subject.mlps if a.sequential else _busiest(a)
    own = [c for c in a.chains if c.mlp in mine]
    model = {"device": a.model_bytes} if a.on_gpu else {"host": a.model_bytes}
    fused = {"host": a.fused_bytes}
    # A mixture's chains are put together from those of its experts.
    chain = {"host": max(c.params * (1 + (c.count > 1)) for c in a.chains) * a.stored_itemsize}
    written = {"host": min(a.checkpoint_bytes, SHARD)}
    both = {} if a.on_demand else model  # the locked model beside it; where there is no room each has half
    made = a.subject.files + a.subject.copied if a.subject.copied else 0  # the plain copy of quantised files
    done = [
        _with(Phase("reading", moved=2 * a.subject.disk + made, disk=a.subject.disk), model, fused),
        _with(_text(a), model, fused),
        _with(_foretelling(a), model),
        _with(_activations(a, a.subject.mlps), model, fused, chain),
        _with(_distilling(a, own), model, fused, chain),
        _with(_redistilling(a, own), model, fused, chain),
        _with(_end_to_end(a), model, fused),
        _with(_writing(a), model, fused, written),
        _with(_measuring(a), model, fused, both),
    ]
    return [replace(p, host=p.host + a.tokens * 8) for p in done if p.flops or p.moved]


def to_come(
    a: Amounts, fits: Collection[str] | None = None, attacks: Collection[str] | None = None
) -> list[progress.Phase]:
    """What a conversion still has to do once its model is read, as its progress is told; where modules are dealt out,
    the first process.

    Args:
        a: The conversion.
        fits: The modules whose chains are still to be fitted, by name; None for all.
        attacks: Those that are still to be attacked, likewise.
    """
    fitted = [c for c in a.chains if fits is None or c.mlp.module in fits]
    attacked = (
        [c for c in a.chains if attacks is None or c.mlp.module in attacks] if a.config.redistill else []
    )
    todo = [c.mlp for c in a.chains if c in fitted or c in attacked]
    if a.sequential:
        rounds = SequentialCalibrator.rounds(a.subject.mlps, todo)
    else:
        hands = dealt_modules(a, todo, a.processes)
        rounds = len(a.groups(hands))
        fitted, attacked = ([c for c in some if c.mlp in hands[0]] for some in (fitted, attacked))
    again = 2 * bool(_end_to_end(a).flops and a.config.redistill)  # the weakest module, before and after
    known = {
        _text(a): 1,
        _foretelling(a): 1,
        _activations(a, todo): rounds + bool(again),
        _distilling(a, fitted): sum(a.fits(c)[0] for c in fitted),
        _redistilling(a, attacked): len(attacked) + again,
        _end_to_end(a): 1,
        _writing(a): 1,
        _measuring(a): _looks(a),
    }
    return [progress.Phase(p.name, _work(a, p), times) for p, times in known.items()]


def sent_by_each(a: Amounts) -> float:
    """Bytes that each of several processes sends in all."""
    return sum(phase.sent for phase in phases(a))


def exchange_words(sent: float) -> str:
    """Bytes that each process sends, and how long they take where nobody measured it."""
    size = f"{sent / 1e12:,.1f} TB" if sent >= 1e12 else f"{sent / 1e9:,.3g} GB"
    return f"{size} from each, {seconds_words(sent / 1e11)} at 100 GB/s"


def foretells(a: Amounts) -> bool:
    """Whether the conversion foretells what its layers cost."""
    return bool(_foretelling(a).flops)


def _work(a: Amounts, p: Phase) -> float:
    """What a phase takes, in FLOPs of wide products."""
    fit, muon = _FIT_AND_MUON["gpu" if a.on_gpu else "cpu"]
    return p.wide + p.narrow + fit * p.fit + muon * p.muon + _BYTE * p.moved + _WORD * p.words


def module_flops(a: Amounts, module: str) -> float:
    """What one module takes: its fit, or those of its experts, and the attack."""
    chains = [c for c in a.chains if c.mlp.module == module]
    return _distilling(a, chains).flops + _redistilling(a, chains).flops


def dealt_modules(a: Amounts, mlps: Sequence[MLP], size: int) -> list[list[MLP]]:
    """Independent modules dealt out to `size` processes by FLOPs: each one's, in their order."""
    alone = replace(a, processes=1)
    return [
        [mlps[job] for job in jobs] for jobs in dealt([module_flops(alone, m.module) for m in mlps], size)
    ]


def _busiest(a: Amounts) -> list[MLP]:
    """The modules of the process that has most to fit, where they are dealt out."""

    def work(mlps: list[MLP]) -> float:
        chains = [c for c in a.chains if c.mlp in mlps]
        return _work(a, _distilling(a, chains)) + _work(a, _redistilling(a, chains))

    return max(filter(None, dealt_modules(a, a.subject.mlps, a.processes)), key=work)


def chain_flops(a: Amounts) -> float:
    """What chains take: activations, fits and the end-to-end phase, without text, attacks, files and measuring."""
    return sum(p.flops for p in (_activations(a, a.subject.mlps), _distilling(a, a.chains), _end_to_end(a)))


def _with(phase: Phase, *parts: Mapping[str, float]) -> Phase:
    """The phase with more bytes held, by place."""
    return replace(
        phase,
        host=phase.host + sum(part.get("host", 0) for part in parts),
        device=phase.device + sum(part.get("device", 0) for part in parts),
    )


def _place(a: Amounts, size: float) -> dict[str, float]:
    """Where what is computed with lies."""
    return {"device": size} if a.on_gpu else {"host": size}


def _text(a: Amounts) -> Phase:
    name, disk = "calibration text", a.subject.disk
    if a.config.data != "self":
        return Phase(name, wide=16 * a.pass_flops, disk=disk, **_place(a, 0))
    return Phase(name, narrow=a.tokens * a.pass_flops, disk=disk, **_place(a, a.logit_bytes))


def _foretelling(a: Amounts) -> Phase:
    """A pass to the end and back; none where layers are not to be chosen and it is no small part of the whole. The
    first process does it alone, and whether it does is the same however many there are."""
    a = replace(a, processes=1)
    chosen = automatic(a.config.layers) is not None
    mlps = a.subject.every if chosen else a.subject.mlps
    train = a.tokens - a.held
    none = Phase("foretelling")
    if why_unknown(a.subject.model, mlps, train, whole=not a.on_demand):
        return none
    tokens = min(train, foretelling_tokens(mlps))
    back = 1 - min(mlp.layer for mlp in mlps) / a.layers  # to the first layer
    once = max(a.length, AT_ONCE)
    sizes = [mlp.hidden_size for mlp in mlps]
    made = Phase(
        none.name,
        wide=tokens * ((1 + back) * a.pass_flops + sum(4.0 * d * d for d in sizes))
        + sum(2.7 * d**3 for d in sizes),
        words=3.0 * tokens * a.subject.vocabulary,
        disk=a.subject.disk,
        **_place(
            a,
            8.0 * sum(d * d for d in sizes)
            + 4.0 * once * sum(12 * mlp.hidden_size + 4 * mlp.intermediate_size for mlp in a.subject.every)
            + 12.0 * once * a.subject.vocabulary,
        ),
    )
    others = (
        _text(a), _activations(a, a.subject.mlps), _distilling(a, a.chains), _redistilling(a, a.chains),
        _end_to_end(a), _writing(a), _measuring(a),
    )  # fmt: skip
    small = _work(a, made) <= _FORETELLING * sum(_work(a, phase) for phase in others)
    # Of fits and sizes of chains that nobody measured nothing is foretold unasked.
    known = measured(int(a.config.train_tokens or 0)) and all(
        abs(c.count * c.spec.params / c.mlp.params - 1) < _OWN_SIZE for c in a.chains
    )
    return made if chosen or (small and known) else none


def _activations(a: Amounts, todo: list[MLP]) -> Phase:
    """todo: the modules whose activations are wanted, by whatever process."""
    mlps, sent = a.subject.mlps, 0.0
    if a.sequential:
        # Each module is looked at in both streams, but the first in one; each layer from the first on is passed twice.
        layers = sorted({mlp.layer for mlp in mlps})
        looks = 2 * len(todo) - (mlps[0] in todo)
        passes = float(layers[0] + looks + 2 * (layers[-1] - layers[0] + 1))
        extra = 2.0 * a.length * a.layers  # whether layers can be run one at a time
        chains = sum(2.0 * c.active for c in a.chains)
        tokens, _ = a.own(a.spread)
    else:
        groups = a.groups(dealt_modules(a, todo, a.processes))
        passes = float(sum(max(mlp.layer for mlp in group) + 1 for group in groups))
        extra, chains = 8.0 * a.layers, 0.0
        tokens = a.batch_tokens
        away = 1 - 1 / a.processes
        sent = away * tokens * sum(4.0 * mlp.hidden_size for mlp in todo)  # x and y in 16 bits
    work = 4.0 * BATCH_TOKENS * (4 * a.hidden + 2 * max(m.intermediate_size for m in mlps))
    phase = Phase(
        "activations",
        wide=(passes * tokens + extra) * a.layer_flops + chains * tokens,
        sent=sent,
        host=a.activations_held,
        disk=a.subject.disk + a.spilled + a.chain_bytes,
    )
    return _with(phase, _place(a, work))


def _sent(params: float, size: int) -> float:
    """Bytes that a process of `size` sends in a step: a sum of all gradients, which is two rounds, and a gathering."""
    return 3 * 4.0 * params * (size - 1) / size


def _fit(
    a: Amounts, name: str, fits: Sequence[tuple[DLRSpec, Recipe, int, int]], own: float, wide: float
) -> Phase:
    """fits: a chain, its recipe, how often, and by how many processes; own: bytes that are held beside a fit."""
    counted = [
        (
            times * math.ceil(recipe.train_tokens / recipe.batch),
            step_of(spec, replace(recipe, train_tokens=recipe.batch, seed=0), a.parts, size),
        )
        for spec, recipe, times, size in fits
    ]
    most = max((step.held for _, step in counted), default=0) + own
    memory, disk = a.experts_held
    phase = Phase(
        name,
        wide=wide,
        fit=float(sum(count * (step.passes + step.reading) for count, step in counted)),
        muon=float(sum(count * step.muon for count, step in counted)),
        sent=sum(
            count * _sent(spec.params, size)
            for (count, _), (spec, *_, size) in zip(counted, fits, strict=True)
        ),
        host=a.activations_held + memory,
        disk=a.subject.disk + a.spilled + disk + a.chain_bytes,
    )
    return _with(phase, _place(a, most))


def _distilling(a: Amounts, chains: Sequence[Chains]) -> Phase:
    d = a.hidden
    known = min(PRECONDITIONER_TOKENS, a.tokens)  # collected whole by every process
    tokens, held = a.own(a.spread)
    wide = sum(a.fits(c)[0] * 2.0 * d * d * known + 6.0 * c.active * held for c in chains)
    sent = 0.0
    for c in (c for c in chains if c.count > 1):
        times, _ = a.fits(c)
        # What experts make of their tokens, and where modules correct one another what they make together.
        wide += 2.0 * c.replaced * (a.tokens * times / c.count + a.sequential * tokens)
        away = 1 - 1 / a.spread
        # x and what is missing of y, of all tokens to whoever has their experts; then all chains to all.
        sent += away * (c.count * a.rows(c) / a.spread * 4.0 * d + c.params * a.stored_itemsize)
    mlp = max((c.mlp.params / c.count for c in chains), default=0) * 4.0
    # The teacher's matrices, read as float32, and the sums that a fit starts from are held before its steps.
    own = mlp * a.on_gpu + 4.0 * known * d
    phase = _fit(a, "distilling", [(c.spec, c.recipe, *a.fits(c)) for c in chains], own, wide)
    return replace(phase, sent=phase.sent + sent)


def _redistilling(a: Amounts, chains: Sequence[Chains]) -> Phase:
    if not a.config.redistill:
        return Phase("redistilling")
    attacked = [(c, a.fits(c)[1]) for c in chains]
    if a.config.end_to_end:  # the weakest module once more, before and after that phase, by all processes
        attacked += 2 * [(c, a.processes) for c in a.chains if c.count == 1][:1]
    if not attacked:
        return Phase("redistilling")
    wide, fits = 0.0, []
    for made, size in attacked:
        share = a.rows(made) / a.tokens  # of the text that an expert is given
        tokens, held = (share * count for count in a.own(size))
        used = round(min(FIT_TOKENS, share * a.tokens))  # collected whole by every process
        spec = made.spec
        fits += [(student, recipe, 1, size) for student, recipe in a.students(made)]
        wide += 12.0 * spec.params * held * len(INITS)
        # Once a chain: its outputs, and the linear start.
        wide += regression_flops(spec, used, half_of(spec)) + 2.0 * spec.params * (tokens + used)
    largest = max(made.spec.params for made, _ in attacked) * 4.0
    rows = max(min(a.rows(made), a.own(size)[0]) for made, size in attacked)
    return _fit(a, "redistilling", fits, 3 * largest + 2.0 * rows * a.hidden, wide)


def _end_to_end(a: Amounts) -> Phase:
    tokens = float(a.config.end_to_end or 0)
    chains = float(sum(c.params for c in a.chains if c.count == 1))  # experts' chains stay as they are
    if not tokens or not chains:
        return Phase("end-to-end")
    step = (
        a.pass_flops + 2 * (a.locked_flops - 2 * chains) + 6 * chains
    )  # original; student, its chains apart
    once, passes = EndToEndPlan(int(tokens)).passes(a.length, a.subject.vocabulary)
    sequences = once * passes  # of a step, dealt out to all processes
    steps = math.ceil(tokens / (a.length * sequences))
    mine = -(-sequences // a.processes)
    tokens *= mine / sequences
    at_once = a.length * min(once, mine)
    # Of every step of every chain: the state that it reads and what it reads there and makes of that, for backward.
    kept = at_once * sum(
        4.0 * c.spec.depth * c.spec.lanes * (c.spec.hidden_size + 2 * c.spec.rank)
        for c in a.chains
        if c.count == 1
    )
    # Of both models in float32, the loss's gradient and what backward makes of it; a half in the model's own dtype.
    logits = 3.5 * 4 * at_once * a.subject.vocabulary if predicts_next(a.subject.model) else 0
    return Phase(
        "end-to-end",
        wide=tokens * step,
        words=2 * tokens * a.subject.vocabulary,
        sent=steps * _sent(chains, a.processes),
        disk=a.subject.disk + a.chain_bytes,
        **_place(a, 16 * chains + logits + 24.0 * at_once * a.hidden * a.layers + kept),
    )


def _writing(a: Amounts) -> Phase:
    cast = a.on_demand and a.stored_itemsize != a.subject.dtype.itemsize
    files = a.chain_bytes + a.checkpoint_bytes * (1 + cast)  # cast to another dtype in files of their own
    disk = a.subject.disk
    return Phase("writing", moved=disk + 3 * a.checkpoint_bytes, disk=disk + files)


def _looks(a: Amounts) -> int:
    """How often the locked model is measured: at the end, and before and after the end-to-end phase."""
    return 1 + 2 * bool(_end_to_end(a).flops)


def _measuring(a: Amounts) -> Phase:
    chains = sum(c.params for c in a.chains if c.count == 1)
    gaps = (_looks(a) - 1) * a.held * (a.locked_flops + 4 * chains)  # before and after the end-to-end phase
    return Phase(
        "measuring",
        wide=_looks(a) * a.held * (a.pass_flops + a.locked_flops) + gaps,
        words=_looks(a) * 2.0 * a.held * a.subject.vocabulary,
        disk=a.subject.disk + a.chain_bytes + a.checkpoint_bytes,
        **_place(a, a.logit_bytes),
    )
