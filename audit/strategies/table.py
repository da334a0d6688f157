"""All ways that the audit knows to train a chain, or the MLP that it replaced: one table for a slot and a whole model.

A strategy gives the gradients of plain autograd at another cost. A new one is an entry of STRATEGIES.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import Tensor

from ...microbench.slot import dense_mlp
from ...runtime import DLRSpec
from ...triton_kernels import chain_reference
from .checkpoint import checkpointed, segmented, selective
from .compiled import compiled
from .inversion import inverted
from .lookahead import lookahead_trained
from .lora import adapted_chain, adapted_mlp, merged_chain

Forward = Callable[..., Tensor]
Trainable = Literal["weights", "adapters", "nothing"]  # nothing: of a slot, where adapters sit outside of it
ALL: tuple[Trainable, ...] = ("weights", "adapters", "nothing")
WEIGHTS: tuple[Trainable, ...] = ("weights",)
WHOLE: tuple[Trainable, ...] = ("weights", "adapters")  # of a model

ADAPTER_RANK = 16  # of an MLP's matrices
_PREFIX = {"weights": "", "adapters": "LoRA, ", "nothing": "LoRA on attention, "}
_BUDGET = 0.5  # of what a compiled step would keep by itself


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way to run the forward pass of a slot, or of all slots of a model, such that its backward costs what it costs.

    Attributes:
        name: What the report calls it; `training` puts what is trained before it.
        form: What a chain of a spec is run by, (x, weights) -> y; None for the chain as it is, or the MLP. A form of
            its own is for chains alone, and trains adapters merged into the weights.
        wrap: What is put around the forward of a chain or an MLP, given the hidden size; None for nothing.
        slot, model: What may be trained in a slot, and in a whole model: weights, adapters or, in a slot, nothing. In a
            model "weights" are all of its weights, "adapters" those of all that is linear in its layers and of its
            chains.
        fits: Whether the strategy makes sense for a slot's chain.
        compiled: Whether it is compiled, and can be timed but not counted.
        layers: Whether every layer of a model is checkpointed, too.
        trainable: What is trained.
    """

    name: str
    form: Callable[[DLRSpec], Forward] | None = None
    wrap: Callable[[Forward, int], Forward] | None = None
    slot: tuple[Trainable, ...] = ALL
    model: tuple[Trainable, ...] = WHOLE
    fits: Callable[[DLRSpec], bool] = lambda spec: True
    compiled: bool = False
    layers: bool = False
    trainable: Trainable = "weights"

    def training(self, trainable: Trainable) -> "Strategy":
        """The same, to train this."""
        return replace(self, name=_PREFIX[trainable] + self.name, trainable=trainable)

    def wrapped(self, forward: Forward, hidden_size: int) -> Forward:
        """A forward pass as the strategy runs it."""
        return forward if self.wrap is None else self.wrap(forward, hidden_size)

    def chain(self, spec: DLRSpec) -> Forward:
        """A chain's forward pass: (x [..., d], ChainWeights) -> y [..., d].

        Where adapters are trained it takes `adapters` too: (V, U) for each of A, B and, of gated steps, G.
        """
        if self.trainable != "adapters":
            return self.wrapped(self.form(spec) if self.form else chain_reference, spec.hidden_size)
        if self.form is None:
            return self.wrapped(adapted_chain, spec.hidden_size)
        return partial(merged_chain, form=self.wrapped(self.form(spec), spec.hidden_size))

    def mlp(self, hidden_size: int) -> Forward:
        """An MLP's forward pass: (x [..., d], DenseWeights) -> y [..., d], with `adapters` likewise."""
        return self.wrapped(adapted_mlp if self.trainable == "adapters" else dense_mlp, hidden_size)


def slot_strategies(spec: DLRSpec | None) -> list[Strategy]:
    """The strategies of a slot with a chain, or, without a spec, with an MLP; for each that is trained, plain first."""
    return [
        strategy.training(trainable)
        for trainable in ALL
        for strategy in STRATEGIES
        if trainable in strategy.slot and (strategy.form is None if spec is None else strategy.fits(spec))
    ]


def model_strategies(*, locked: bool) -> list[Strategy]:
    """The strategies of a locked model, or of one without chains of several steps; for each that is trained, plain
    first. Those that wrap nothing come once more with every layer checkpointed."""
    found = []
    for trainable in WHOLE:
        own = [s for s in STRATEGIES if trainable in s.model and (locked or s.form is None)]
        own += [replace(s, name=f"layer checkpoint, {s.name}", layers=True) for s in own if s.wrap is None]
        found += [strategy.training(trainable) for strategy in own]
    return found


def adapter_rank(spec: DLRSpec) -> int:
    """The rank at which a chain's adapters have as many parameters as those of ADAPTER_RANK of a SwiGLU MLP of the
    chain's size; one at least. A chain's matrices are many and thin, so it is less: 2 for 1x36x64 in 576x1536."""
    d, r = spec.hidden_size, spec.rank
    matrices = spec.params // (d * r)
    width = spec.params / (3 * d)
    return max(1, round(ADAPTER_RANK * 3 * (d + width) / (matrices * (d + r))))


def best_segment(spec: DLRSpec) -> int:
    """Steps of a segment at which a checkpointed chain keeps and works with the least.

    K / s states of d are kept, and s steps' states and hidden units computed once more (a step's reads and h: 2 r), so
    s = sqrt(K d / (d + 2 r)): Chen et al., arXiv 1604.06174, with what a step itself keeps.
    """
    d, r = spec.hidden_size, spec.rank
    return min(spec.depth, max(1, round(math.sqrt(spec.depth * d / (d + 2 * r)))))


def _segments(spec: DLRSpec) -> Forward:
    return partial(segmented, steps=best_segment(spec))


def _several(spec: DLRSpec) -> bool:
    """Whether a chain is of more than one segment."""
    return best_segment(spec) < spec.depth


def _checkpointed(forward: Forward, hidden_size: int) -> Forward:
    return checkpointed(forward)


def _compiled(name: str, **options: float) -> Strategy:
    return Strategy(
        name,
        wrap=lambda forward, hidden_size: compiled(forward, **options),
        slot=WEIGHTS,
        model=(),
        compiled=True,
    )


def _lookahead(width: int, ending: str, form: Forward, model: tuple[Trainable, ...]) -> Strategy:
    """In blocks of this width, for chains where that is more than a step and no more than a lane."""
    return Strategy(
        f"look-ahead {width}{ending}",
        form=lambda spec: partial(form, block=width),
        slot=WEIGHTS,
        model=model,
        fits=lambda spec: 1 < width // spec.rank <= spec.depth,
    )


STRATEGIES: list[Strategy] = [
    Strategy("plain"),
    Strategy("checkpoint", wrap=_checkpointed),
    Strategy("selective", wrap=selective),
    Strategy("merged", form=lambda spec: chain_reference, slot=("adapters",), model=()),
    Strategy("segments", form=_segments, slot=("weights", "nothing"), fits=_several),
    Strategy("nested", form=_segments, wrap=_checkpointed, slot=WEIGHTS, model=(), fits=_several),
    Strategy("inversion", form=lambda spec: inverted, slot=("weights", "adapters")),
    *(
        _lookahead(width, ending, form, WHOLE if (width, ending) in ((256, ""), (256, ", inverted")) else ())
        for width in (128, 256, 512)
        for ending, form in (
            ("", lookahead_trained),
            (", recomputed", partial(lookahead_trained, recompute=True)),
            (", inverted", inverted),
        )
    ),
    Strategy(
        "checkpoint, inverted",
        form=lambda spec: inverted,
        wrap=_checkpointed,
        slot=("weights", "adapters"),
        model=(),
    ),
    _compiled("compiled"),
    _compiled(f"compiled, budget {_BUDGET:g}", memory_budget=_BUDGET),
]
