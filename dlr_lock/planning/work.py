"""What the phases of a conversion compute and hold: FLOPs and bytes, counted without a number of the model.

What is dear and of our own making, a step of a fit, is not reckoned by a formula: the conversion's own code runs on the
meta device under a meter. The rest is products of known sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch

from ..audit.meters import Meter
from ..convert.config import ConversionConfig, Recipe
from ..convert.data import SEQUENCE_LENGTH
from ..convert.distill import muon_groups
from ..convert.evaluate import CHUNK, LOGIT_BYTES, predicts_next
from ..convert.muon import Muon
from ..convert.parallel.balance import trial_gradients
from ..convert.redistill import BATCH, FIT_TOKENS, INITS, attack_tokens
from ..runtime import DLRNet, DLRSpec
from ..runtime.generation import positions
from .subject import Subject

_BATCH_TOKENS = 4096  # of one pass through a layer
_PRECONDITIONER_TOKENS = 40_000
_SHARD = 4e9  # bytes of the checkpoint that are written at a time


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a conversion.

    Attributes:
        name: As the progress calls it.
        wide: FLOPs of products with thousands of tokens.
        fit: FLOPs of a fit's steps.
        narrow: FLOPs of products with the tokens of a few sequences' next position.
        moved: Bytes of weight files that are read, written or hashed.
        words: Elements of tokens by vocabulary whose chances are worked out.
        host, device: Bytes held at the peak, in the machine's memory (without the program itself) and the GPU's.
        disk: Bytes of files that are there during the phase.
    """

    name: str
    wide: float = 0.0
    fit: float = 0.0
    narrow: float = 0.0
    moved: float = 0.0
    words: float = 0.0
    host: float = 0.0
    device: float = 0.0
    disk: float = 0.0

    @property
    def flops(self) -> float:
        """All of them."""
        return self.wide + self.fit + self.narrow


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a fit.

    Attributes:
        flops: Of both passes and of the optimizer.
        held: Bytes alive at the peak: weights, gradients, momentum, the last good state and what is between them.
    """

    flops: int
    held: int


@cache
def step_of(spec: DLRSpec, recipe: Recipe, parts: int) -> Step:
    """Counts one step of `distill`, by running its code on the meta device.

    Args:
        spec: The chain.
        recipe: Its batch, and whether the reading directions have a preconditioner, are what counts.
        parts: How many parts a batch is worked on in at the same time, each with gradients of its own.
    """
    d = spec.hidden_size
    tokens = recipe.batch + int(recipe.batch * 4 / 512)
    meter = Meter()
    with torch.device("meta"):
        weights = {name: torch.empty(spec.weight_shape) for name in DLRNet.weight_names(spec)}
        x = torch.empty(max(1, tokens // parts), d)
        optimizer = Muon(muon_groups(weights, recipe, torch.empty(d, d)), momentum=recipe.momentum)
        with meter:
            trial_gradients(weights, x, spec.act)
        passes, of_passes = meter.take().flops, meter.peak
        own = sum(w.grad.nbytes for w in weights.values() if w.grad is not None)
        with meter:
            optimizer.step()
        steps, of_step = meter.take().flops, meter.peak
        with meter:
            optimizer.step()  # with a momentum that is there already
        of_step = max(of_step, meter.peak)
    size = sum(w.nbytes for w in weights.values())
    # Weights, the last good state, momentum (of which the meter sees the first step's), and the parts' gradients.
    held = 2 * size + max(parts * of_passes + size + (parts > 1) * own, of_step + (parts - 1) * own)
    return Step(passes * parts + steps, held)


@dataclass(frozen=True)
class Amounts:
    """The sizes that all phases are reckoned from.

    Attributes:
        subject: The model.
        config: Resolved.
        specs: The chain of each MLP.
        gpu_memory: Of the GPU that the work is done on, in bytes; None for a CPU.
        parts: Threads of a CPU.
    """

    subject: Subject
    config: ConversionConfig
    specs: list[DLRSpec]
    gpu_memory: float | None
    parts: int

    @classmethod
    def of(cls, subject: Subject, config: ConversionConfig, gpu_memory: float | None = None) -> Amounts:
        """Raises DLRError where the configuration makes no chain for an MLP, or no sequence of text."""
        specs = [config.spec_for(mlp.hidden_size, mlp.params) for mlp in subject.mlps]
        return cls(subject, config, specs, gpu_memory, 1 if gpu_memory else torch.get_num_threads())

    @property
    def on_gpu(self) -> bool:
        """Whether the work is done on a GPU."""
        return self.gpu_memory is not None

    @property
    def length(self) -> int:
        """Tokens of a sequence, n."""
        longest = positions(self.subject.model.config) or SEQUENCE_LENGTH
        return self.config.sequence or min(SEQUENCE_LENGTH, longest)

    @property
    def held(self) -> int:
        """Held-out tokens."""
        return max(1, int(self.config.heldout or 0) // self.length) * self.length

    @property
    def tokens(self) -> int:
        """Tokens of text, held out or not."""
        return int(self.config.tokens or 0) // self.length * self.length + self.held

    @property
    def recipe(self) -> Recipe:
        """Of a module: what it costs does not depend on whether the MLP has a gate."""
        return self.config.recipe(gated=True)

    @property
    def layer_flops(self) -> float:
        """FLOPs of a token in a layer: its matrices, and attention to a whole sequence."""
        text = self.subject.model.config.get_text_config()
        heads = getattr(text, "num_attention_heads", 1)
        width = heads * (getattr(text, "head_dim", None) or self.hidden // heads)
        return 2 * self.subject.body_matrices / self.layers + 4 * self.length * width

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return len(self.subject.layers)

    @property
    def hidden(self) -> int:
        """d."""
        return self.subject.mlps[0].hidden_size

    @property
    def pass_flops(self) -> float:
        """FLOPs of a token through the model, chances of the next one included."""
        head = self.subject.vocabulary * self.hidden if predicts_next(self.subject.model) else 0
        return self.layers * self.layer_flops + 2 * head

    @property
    def stored_itemsize(self) -> int:
        """Bytes of a number in the checkpoint."""
        from ..common.dtypes import DTYPES

        return (DTYPES.get(self.config.dtype) or self.subject.dtype).itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of a weight where it is computed with: float32 on a CPU, as it is stored on a GPU."""
        return self.subject.dtype.itemsize if self.on_gpu else 4

    @property
    def room(self) -> float:
        """Bytes that weights may take."""
        return self.gpu_memory / 2 if self.gpu_memory else float(int(self.config.max_memory or 0))

    @property
    def on_demand(self) -> bool:
        """Whether weights come and go, for the model is larger than its room."""
        return self.subject.params * self.itemsize > self.room

    @property
    def model_bytes(self) -> float:
        """The model's weights in memory: all of them, or as many as there is room for and the two largest parts."""
        whole = self.subject.params * self.itemsize
        if not self.on_demand:
            return whole
        layer = max(sum(p.numel() for p in part.parameters()) for part in self.subject.layers)
        table = self.subject.vocabulary * self.hidden
        # With the file's own numbers of the part that is being read, where they are of another dtype.
        reading = self.subject.dtype.itemsize if self.itemsize != self.subject.dtype.itemsize else 0
        least = self.itemsize * (max(layer, table) + layer) + reading * max(layer, table)
        return min(whole, max(self.room, least))

    @property
    def checkpoint_bytes(self) -> float:
        """The checkpoint to be written."""
        swapped = sum(s.params for s in self.specs) - sum(m.params for m in self.subject.mlps)
        return (self.subject.params + swapped) * self.stored_itemsize

    @property
    def chain_bytes(self) -> float:
        """All chains, as they are kept on the disk."""
        return sum(spec.params for spec in self.specs) * self.stored_itemsize

    @property
    def sequential(self) -> bool:
        """Whether modules correct one another; a model that does not allow it is not known here."""
        return self.config.across != "independent"

    @property
    def activation_bytes(self) -> float:
        """Both streams in float32, and x and y in 16 bits; of one module alone where modules are independent."""
        return (12 if self.sequential else 4) * self.tokens * self.hidden

    @property
    def spills(self) -> bool:
        """Whether activations lie on the disk."""
        return self.activation_bytes > int(self.config.max_memory or 0)

    @property
    def activations_held(self) -> float:
        """What of them is in memory."""
        return 0 if self.spills else self.activation_bytes

    @property
    def logit_bytes(self) -> float:
        """Of a pass with chances: two models' logits in float32, and a part's chances with what they are made of."""
        if not predicts_next(self.subject.model):
            return 0
        row = 4 * self.length * self.subject.vocabulary
        at_once = max(1, min(8, LOGIT_BYTES // row))
        return 2.5 * at_once * row + 5 * 4 * min(CHUNK, at_once * row / 4)

    def students(self) -> Iterator[tuple[DLRSpec, Recipe, DLRSpec]]:
        """What the attack fits: a student's shape, its recipe, and the chain's shape."""
        if not self.config.redistill:
            return
        count = attack_tokens(self.config.redistill, self.recipe.train_tokens)
        for spec in self.specs:
            for init in INITS:
                student = DLRSpec(spec.hidden_size, 1, 1, spec.lanes * spec.depth * spec.rank, spec.act)
                if init == "linear":
                    half = -(-spec.depth // 2)
                    steps = -(-spec.depth // half)
                    student = DLRSpec(spec.hidden_size, spec.lanes, steps, half * spec.rank, spec.act)
                if init == "random":
                    student = DLRSpec.of_params(
                        spec.hidden_size, spec.params, depth=1, act="silu", gated=True
                    )
                yield student, Recipe(count, min(BATCH, count), "random"), spec


def phases(a: Amounts) -> list[Phase]:
    """The phases of a conversion, in their order.

    On a CPU everything is in the machine's memory; on a GPU the model, a fit and the logits are in its own.
    """
    model = {"device": a.model_bytes} if a.on_gpu else {"host": a.model_bytes}
    text, disk = a.tokens * 8.0, a.subject.disk
    chain = {"host": max(spec.params for spec in a.specs) * a.stored_itemsize}
    written = {"host": min(a.checkpoint_bytes, _SHARD)}
    both = {} if a.on_demand else model  # the locked model beside it; where there is no room each has half
    done = [
        _with(Phase("reading", moved=2 * disk, disk=disk), a, model),
        _with(_text(a, disk), a, model),
        _with(_activations(a, disk), a, model, chain),
        _with(_distilling(a, disk), a, model, chain),
        _with(_redistilling(a, disk), a, model, chain),
        _with(_end_to_end(a, disk), a, model),
        _with(_writing(a, disk), a, model, written),
        _with(_measuring(a, disk), a, model, both),
    ]
    return [replace(p, host=p.host + text) for p in done if p.flops or p.moved]


def _with(phase: Phase, a: Amounts, *parts: Mapping[str, float]) -> Phase:
    """The phase with what it shares with others."""
    host, device = (phase_bytes + sum(p.get(place, 0) for p in parts) for place, phase_bytes in (
        ("host", phase.host), ("device", phase.device)))  # fmt: skip
    return replace(phase, host=host, device=device)


def _place(a: Amounts, size: float) -> dict[str, float]:
    """Where what is computed with lies."""
    return {"device": size} if a.on_gpu else {"host": size}


def _text(a: Amounts, disk: float) -> Phase:
    if a.config.data != "self":
        return Phase("calibration text", wide=16 * a.pass_flops, disk=disk, **_place(a, 0))
    return Phase("calibration text", narrow=a.tokens * a.pass_flops, disk=disk, **_place(a, a.logit_bytes))


def _activations(a: Amounts, disk: float) -> Phase:
    mlps = a.subject.mlps
    if a.sequential:
        # Each stream through the layers that keep their MLPs, and twice through those that lose them.
        passes = float(mlps[0].layer + 3 + 4 * (len(mlps) - 1))
        passes += 2 * (mlps[-1].layer - mlps[0].layer + 1 - len(mlps))
        extra = 2.0 * a.length * a.layers  # whether layers can be run one at a time
        chains = sum(2.0 * spec.params for spec in a.specs)
    else:
        size = a.activation_bytes
        each = max(1, int(int(a.config.max_memory or 0) // size))
        passes = float(sum(group[-1].layer + 1 for group in _chunks(mlps, each)))
        extra, chains = 8.0 * a.layers, 0.0
    spilled = a.activation_bytes if a.spills else 0
    work = 4.0 * _BATCH_TOKENS * (4 * a.hidden + 2 * max(m.intermediate_size for m in mlps))
    place = _place(a, work)
    return Phase(
        "activations",
        wide=(passes * a.tokens + extra) * a.layer_flops + chains * a.tokens,
        host=a.activations_held + place.get("host", 0),
        device=place.get("device", 0),
        disk=disk + spilled + a.chain_bytes,
    )


def _chunks(items: list, size: int) -> Iterator[list]:
    yield from (items[at : at + size] for at in range(0, len(items), size))


def _fit(a: Amounts, name: str, fits: list[tuple[DLRSpec, Recipe]], own: float, wide: float) -> Phase:
    """own: bytes that are held beside the fit."""
    steps = {
        spec: step_of(spec, replace(recipe, train_tokens=recipe.batch, seed=0), a.parts)
        for spec, recipe in fits
    }
    flops: float = sum(
        math.ceil(recipe.train_tokens / recipe.batch) * steps[spec].flops for spec, recipe in fits
    )
    most = max((step.held for step in steps.values()), default=0) + own
    place = _place(a, most)
    return Phase(
        name,
        wide=wide,
        fit=flops,
        host=a.activations_held + place.get("host", 0),
        device=place.get("device", 0),
        disk=a.subject.disk + (a.activation_bytes if a.spills else 0) + a.chain_bytes,
    )


def _distilling(a: Amounts, disk: float) -> Phase:
    d = a.hidden
    known = min(_PRECONDITIONER_TOKENS, a.tokens)
    wide = sum(2.0 * d * d * known + 6.0 * spec.params * a.held for spec in a.specs)
    mlp = max(m.params for m in a.subject.mlps) * 4.0
    # The teacher's matrices, read as float32, and the sums that a fit starts from are held before its steps.
    return _fit(
        a, "distilling", [(spec, a.recipe) for spec in a.specs], mlp * a.on_gpu + 4.0 * known * d, wide
    )


def _redistilling(a: Amounts, disk: float) -> Phase:
    fits: list[tuple[DLRSpec, Recipe]] = []
    wide, seen = 0.0, set()
    for student, recipe, spec in a.students():
        fits.append((student, recipe))
        wide += 10.0 * spec.params * a.held
        if spec not in seen or student.gated:  # once a chain: its outputs, and the linear starts
            d, n = spec.hidden_size, min(FIT_TOKENS, a.tokens)
            starts = spec.depth * (4.0 * d * d * n + 2.0 * d**3 + 2.0 * spec.rank * d * d)
            wide += starts + 2.0 * spec.params * (a.tokens + n)
        seen.add(spec)
    if not fits:
        return Phase("redistilling")
    largest = max(spec.params for spec in a.specs) * 4.0
    return _fit(a, "redistilling", fits, 3 * largest + 2.0 * a.tokens * a.hidden, wide)


def _end_to_end(a: Amounts, disk: float) -> Phase:
    tokens = float(a.config.end_to_end or 0)
    if not tokens:
        return Phase("end-to-end")
    chains = float(sum(spec.params for spec in a.specs))
    mlps = float(sum(mlp.params for mlp in a.subject.mlps))
    locked = a.pass_flops + 2 * (chains - mlps)
    step = (
        a.pass_flops + 2 * (locked - 2 * chains) + 8 * chains
    )  # original; student; its chains twice forward
    place = _place(a, 16 * chains + 2 * a.logit_bytes + 24.0 * 2048 * a.hidden * a.layers)
    return Phase(
        "end-to-end",
        wide=tokens * step + 2 * a.held * (a.pass_flops + locked + 4 * chains),
        words=3 * tokens * a.subject.vocabulary + 4 * a.held * a.subject.vocabulary,
        host=place.get("host", 0),
        device=place.get("device", 0),
        disk=disk + a.chain_bytes,
    )


def _writing(a: Amounts, disk: float) -> Phase:
    cast = a.on_demand and a.stored_itemsize != a.subject.dtype.itemsize
    files = a.chain_bytes + a.checkpoint_bytes * (1 + cast)  # cast to another dtype in files of their own
    return Phase("writing", moved=disk + 3 * a.checkpoint_bytes, disk=disk + files)


def _measuring(a: Amounts, disk: float) -> Phase:
    chains, mlps = sum(s.params for s in a.specs), sum(m.params for m in a.subject.mlps)
    place = _place(a, a.logit_bytes)
    return Phase(
        "measuring",
        wide=a.held * (2 * a.pass_flops + 2.0 * (chains - mlps)),
        words=2.0 * a.held * a.subject.vocabulary,
        host=place.get("host", 0),
        device=place.get("device", 0),
        disk=disk + a.chain_bytes + a.checkpoint_bytes,
    )
