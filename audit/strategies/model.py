"""The training step of a whole model, locked or original, by any strategy: attention, norms and logits included."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...common.errors import DLRError
from ...convert.mlp_matching import is_linear, mixtures
from ...runtime import DLRExperts, DLRNet
from ...triton_kernels import ChainWeights, one_by_one
from ..meters import count_step, time_step
from .checkpoint import checkpointed
from .lora import attached, new_adapter
from .slot import StrategyCost
from .table import ADAPTER_RANK, Strategy, adapter_rank


def model_cost(
    model: PreTrainedModel, mlps: Sequence[str], strategy: Strategy, tokens: Tensor, *, repeats: int = 0
) -> StrategyCost:
    """What one strategy costs: loss and backward on a batch. The model is left as it was.

    Args:
        model: The model.
        mlps: Names of the modules that are in the MLPs' places, or, where an MLP has no module of its own, make it up.
        strategy: One of `table.model_strategies`.
        tokens: The batch, [S, n] int64.
        repeats: How often the step is timed; it is not where this is 0.

    Raises:
        NothingToTrain: Where the strategy has nothing to train.
        DLRError: Where a name is no module of a numbered layer.
    """
    with prepared(model, mlps, strategy) as trained:

        def loss(ids: Tensor) -> Tensor:
            return model(input_ids=ids, labels=ids, use_cache=False).loss

        counts = count_step(loss, tokens, trained)
        seconds = time_step(loss, tokens, trained, repeats=repeats) if repeats else None
    return StrategyCost(strategy.name, strategy.trainable, counts.saved, counts, seconds)


@contextmanager
def prepared(
    model: PreTrainedModel, mlps: Sequence[str], strategy: Strategy, spared: Sequence[str] = ()
) -> Iterator[list[Tensor]]:
    """The model as a strategy trains it, within the block.

    Args:
        model, mlps, strategy: As for `model_cost`.
        spared: Names among `mlps` of modules that run as the strategy runs them and stay as they are.

    Yields:
        What is to be trained: weights of the model, or adapters.

    Raises:
        NothingToTrain: Where there is nothing.
    """
    before = [(p, p.requires_grad) for p in model.parameters()]
    hidden_size = model.config.get_text_config().hidden_size
    with ExitStack() as stack:
        try:
            model.requires_grad_(strategy.trainable == "weights")
            for name in spared:
                model.get_submodule(name).requires_grad_(False)
            trained = [p for p in model.parameters() if p.requires_grad]
            if strategy.trainable == "adapters":
                trained += stack.enter_context(attached(attention_linears(model, mlps), ADAPTER_RANK))
            outside = len(trained)
            for name in mlps:
                module = model.get_submodule(name)
                forward: Callable[..., Any] | None = None
                adapted = strategy.trainable == "adapters" and name not in spared
                alone = strategy if strategy.trainable == "weights" else strategy.training("nothing")
                if isinstance(module, DLRExperts):  # which adapters leave as they are, see the error below
                    grouped = partial(_run_experts, module, alone.chain(module.spec.chain))
                    stack.enter_context(replaced(module, grouped, "grouped"))
                elif isinstance(module, DLRNet):
                    run = (strategy if adapted else alone).chain(module.spec)
                    if adapted:
                        rank = adapter_rank(module.spec)
                        adapters = [new_adapter(w.detach(), rank) for w in module.chain.weights]
                        trained += [t for adapter in adapters for t in adapter]
                        run = partial(run, adapters=adapters)
                    forward = partial(_run_chain, module, run)
                else:
                    if adapted:
                        linears = [m for m in module.modules() if is_linear(m)]
                        trained += stack.enter_context(attached(linears, ADAPTER_RANK))
                    # of a strewn MLP's parts, one alone is not worth a checkpoint
                    if not is_linear(module) and any(True for _ in module.parameters()):
                        forward = strategy.wrapped(module.forward, hidden_size)
                if forward is not None:
                    stack.enter_context(replaced(module, forward))
            if strategy.layers:
                for layer in dict.fromkeys(map(layer_of, mlps)):
                    module = model.get_submodule(layer)
                    stack.enter_context(replaced(module, checkpointed(module.forward)))
            if (
                strategy.trainable == "adapters"
                and not spared
                and len(trained) == outside
                and mixtures(model)
            ):
                raise NothingToTrain(
                    f"strategy {strategy.name!r} would train the attention alone: adapters fit linear layers, and a "
                    "mixture's experts are none"
                )
            if not trained:
                raise NothingToTrain(
                    f"strategy {strategy.name!r} has nothing to train: it finds no linear layers"
                )
            yield trained
        finally:
            for parameter, wanted in before:
                parameter.requires_grad_(wanted)


@contextmanager
def replaced(module: nn.Module, function: Callable[..., Any], name: str = "forward") -> Iterator[None]:
    """The module with another function for its forward, or another method, within the block."""
    setattr(module, name, function)  # an instance's attribute: the class keeps its own
    try:
        yield
    finally:
        delattr(module, name)


def layer_of(name: str) -> str:
    """The layer that a module is in: its name up to the first number.

    Raises:
        DLRError: Where there is none.
    """
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


def _run_experts(experts: DLRExperts, run: Callable[..., Tensor], x: Tensor, ends: Tensor) -> Tensor:
    chains = experts.chains
    every = [partial(_on_chain, run, chains.chain(expert)) for expert in range(len(ends))]
    return one_by_one(x, ends, every)


def _on_chain(run: Callable[..., Tensor], chain: ChainWeights, x: Tensor) -> Tensor:
    return run(x, chain)


def _run_chain(net: DLRNet, run: Callable[..., Tensor], x: Tensor) -> Tensor:
    return run(x, net.chain)
