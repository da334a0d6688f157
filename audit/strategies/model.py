"""The training step of a whole model, locked or original, by every strategy: attention, norms and logits included."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...common.errors import DLRError
from ...convert.mlp_matching import is_linear
from ...runtime import DLRNet, DLRSpec
from ...triton_kernels import chain_reference
from ..meters import count_step, time_step
from .checkpoint import checkpointed, segmented, selective
from .inversion import inverted
from .lookahead import lookahead_trained
from .lora import Adapter, adapted_chain, attached, merged_chain, new_adapter
from .slot import Row
from .slot_strategies import ADAPTER_RANK, Trainable, adapter_rank, best_segment

BLOCK = 256  # of look-ahead
Forward = Callable[..., Any]
Form = Callable[[DLRSpec], Forward]  # of the chain: takes what `chain_reference` takes


@dataclass(frozen=True, slots=True)
class ModelStrategy:
    """form: that a chain is run by. wrap: what is put around an MLP's or a chain's forward, given the hidden size.
    layers: checkpoint every layer, too. trainable: all weights of the model, adapters of all that is linear in its layers and
    of its chains, or (nothing in the slots) adapters of its attention."""

    name: str
    trainable: Trainable
    form: Form
    wrap: Callable[[Forward, int], Forward]
    layers: bool = False


def model_strategies(*, locked: bool) -> list[ModelStrategy]:
    """Those of a locked model, or of an original one, which has no chains."""
    plain: Form = lambda spec: chain_reference  # noqa: E731
    forms: dict[str, Form] = {
        "segments": lambda spec: partial(segmented, steps=best_segment(spec)),
        "inversion": lambda spec: inverted,
        f"look-ahead {BLOCK}": lambda spec: partial(lookahead_trained, block=BLOCK),
        f"look-ahead {BLOCK}, inverted": lambda spec: partial(inverted, block=BLOCK),
    }
    strategies: list[ModelStrategy] = []
    trainables: dict[Trainable, str] = {"weights": "", "adapters": "LoRA, ", "nothing": "LoRA on attention, "}
    for trainable, prefix in trainables.items():
        chains = forms if locked else {}
        strategies += [
            ModelStrategy(f"{prefix}plain", trainable, plain, _bare),
            ModelStrategy(
                f"{prefix}checkpointed MLPs", trainable, plain, lambda forward, _: checkpointed(forward)
            ),
            ModelStrategy(f"{prefix}selective", trainable, plain, selective),
            *(ModelStrategy(prefix + name, trainable, form, _bare) for name, form in chains.items()),
            *(
                ModelStrategy(f"{prefix}layer checkpoint, {name}", trainable, form, _bare, layers=True)
                for name, form in {"plain": plain, **chains}.items()
            ),
        ]
    return strategies


def measure_model(
    model: PreTrainedModel, mlps: Sequence[str], strategy: ModelStrategy, tokens: Tensor, *, repeats: int = 0
) -> Row:
    """The row of one strategy: loss and backward on tokens [S, n] int64. mlps: names of the modules that are in the MLPs'
    places, or, where an MLP has no module of its own, make it up.

    Raises DLRError where a name is no module of a numbered layer. The model is left as it was.
    """
    with prepared(model, mlps, strategy) as trained:

        def loss(ids: Tensor) -> Tensor:
            return model(input_ids=ids, labels=ids, use_cache=False).loss

        counts = count_step(loss, tokens, trained)
        seconds = time_step(loss, tokens, trained, repeats=repeats) if repeats else None
    return Row(strategy.name, strategy.trainable, counts.saved, counts, seconds)


@contextmanager
def prepared(model: PreTrainedModel, mlps: Sequence[str], strategy: ModelStrategy) -> Iterator[list[Tensor]]:
    """The model as the strategy trains it, within the block; gives what is to be trained."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    hidden_size = model.config.get_text_config().hidden_size
    with ExitStack() as stack:
        try:
            model.requires_grad_(strategy.trainable == "weights")
            trained = [p for p in model.parameters() if p.requires_grad]
            if strategy.trainable != "weights":
                trained += stack.enter_context(attached(attention_linears(model, mlps), ADAPTER_RANK))
            for name in mlps:
                module = model.get_submodule(name)
                forward = module.forward
                if isinstance(module, DLRNet):
                    adapters = None
                    if strategy.trainable == "adapters":
                        weights = [getattr(module, w) for w in module.weight_names(module.spec)]
                        adapters = [new_adapter(w.detach(), adapter_rank(module.spec)) for w in weights]
                        trained += [t for adapter in adapters for t in adapter]
                    forward = _chain(module, strategy.form(module.spec), adapters)
                elif strategy.trainable == "adapters":
                    linears = [m for m in module.modules() if is_linear(m)]
                    trained += stack.enter_context(attached(linears, ADAPTER_RANK))
                whole = isinstance(module, DLRNet) or (
                    not is_linear(module) and any(True for _ in module.parameters())
                )
                if whole:  # of a strewn MLP's parts, one alone is not worth a checkpoint
                    stack.enter_context(replaced(module, strategy.wrap(forward, hidden_size)))
            if strategy.layers:
                for layer in dict.fromkeys(map(layer_of, mlps)):
                    module = model.get_submodule(layer)
                    stack.enter_context(replaced(module, checkpointed(module.forward)))
            if not trained:
                raise NothingToTrain(
                    f"strategy {strategy.name!r} has nothing to train: it finds no linear layers"
                )
            yield trained
        finally:
            for parameter, wanted in before:
                parameter.requires_grad_(wanted)


@contextmanager
def replaced(module: nn.Module, forward: Forward) -> Iterator[None]:
    """The module with another forward, within the block."""
    module.forward = forward  # an instance's attribute: the class keeps its own
    try:
        yield
    finally:
        del module.forward


def layer_of(name: str) -> str:
    """The layer that a module is in: its name up to the first number. Raises DLRError where there is none."""
    found = re.match(r"(?:.*?\.)??\d+(?=\.|$)", name)
    if found is None:
        raise DLRError(f"{name} is in no numbered layer, so its layer cannot be checkpointed")
    return found[0]


class NothingToTrain(DLRError):
    """A strategy adapts what a model has not."""


def attention_linears(model: nn.Module, mlps: Sequence[str]) -> list[nn.Module]:
    """The linear layers of the MLPs' layers that are not within the MLPs."""
    layers = tuple(f"{layer_of(name)}." for name in mlps)
    within = tuple(f"{name}." for name in mlps)
    return [
        module
        for name, module in model.named_modules()
        if is_linear(module) and name.startswith(layers) and not f"{name}.".startswith(within)
    ]


def _bare(forward: Forward, hidden_size: int) -> Forward:
    return forward


def _chain(net: DLRNet, form: Forward, adapters: list[Adapter] | None) -> Forward:
    if adapters is None:
        return lambda x: form(x, net.chain)
    if form is chain_reference:
        return lambda x: adapted_chain(x, net.chain, adapters=adapters)
    return lambda x: merged_chain(x, net.chain, adapters=adapters, form=form)
