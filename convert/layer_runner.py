"""A model's layers, run one at a time on hidden states that are kept between them.

What a model hands to each layer besides the hidden states (masks, positions, rotary tables) is caught from a
real pass and given again. That this is right is settled by running: two texts must get the same extras, and
each layer must begin with what the one before gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..common.errors import DLRError
from ..common.hooks import StopForward, frozen, is_paired, removed, watch_pass
from .experts.routing import Routing, read_call, read_output

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


class Placed(Protocol):
    """An MLP by the names of the module whose input is its x and of the one whose output is its y."""

    @property
    def module(self) -> str: ...

    @property
    def output(self) -> str: ...


@dataclass(frozen=True)
class Sum:
    """Where an MLP's output y meets the rest of the layer: total = factor * y + rest.

    Attributes:
        module: The first module whose input is the total, inside the layer (the norm of a post-norm layer); None
            for the layer's output.
        factor: What y is multiplied with on its way.
    """

    module: str | None
    factor: float


@dataclass(frozen=True)
class Seen:
    """What one run of a layer showed.

    Attributes:
        x, y: Input and output of its MLP, [b, n, d].
        total: The total of its `Sum`, [b, n, d]; None where none was asked for.
        out: The layer's output, [b, n, d].
        routing: Of a mixture, which experts each of the b n tokens is given to.
    """

    x: Tensor
    y: Tensor
    total: Tensor | None
    out: Tensor
    routing: Routing | None = None


class Unrepeatable(DLRError):
    """The model's layers cannot be run one at a time."""


def check_one_text(model: nn.Module) -> None:
    """Raises Unrepeatable where a model's layers get more that depends on the text than hidden states, as is known
    without running it."""
    if is_paired(model):
        raise Unrepeatable("its decoder's layers are given what the encoder read")


class LayerRunner:
    """The layers that hold some MLPs, run one at a time on sequences of one length.

    Args:
        model: Any transformers model.
        mlps: The MLPs, in model order.
        tokens: [S, n] int64, a text like the one that is run.
        like: Of a model of the same class, whose layers are known to be repeatable; None to find out.

    Raises:
        Unrepeatable: Where the layers are not one list, are not called once each and in order, or get something
            besides hidden states that depends on the text (an encoder's output, for one).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mlps: Sequence[Placed],
        tokens: Tensor,
        like: LayerRunner | None = None,
    ) -> None:
        check_one_text(model)
        self._model = model
        self._tokens = tokens
        self._layers, places = _layers_of(model, mlps)
        self._outputs = {mlp.module: mlp.output for mlp in mlps}
        self._names = {id(module): name for name, module in model.named_modules()}
        self._extras: dict[int, list[_Call]] = {}
        self.layer_of = places
        self._kinds: set[int] = (
            set()
        )  # of layers' outputs: 0 for a tensor, else how many things a tuple holds
        self.dtype: torch.dtype  # of the hidden states
        if like is None:
            self._check()
        else:
            self.dtype, self._kinds = like.dtype, like._kinds

    @property
    def device(self) -> torch.device:
        """Where the layers run."""
        return self._model.device

    def __len__(self) -> int:
        return len(self._layers)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [b, n] -> the hidden states that the first layer gets, [b, n, d]."""
        caught: list[Tensor] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(_Call.of(args, kwargs)[0].clone())
            raise StopForward

        watch_pass(self._model, ids, [self._layers[0].register_forward_pre_hook(enter, with_kwargs=True)])
        return caught[0]

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Layer number `index` on hidden states [b, n, d] -> [b, n, d]."""
        call = self._calls(len(hidden))[index]
        with frozen(self._model):
            return _hidden(self._layers[index](hidden, *call.args, **call.kwargs))

    def look(
        self,
        mlp: Placed,
        hidden: Tensor,
        where: Sum | None = None,
        instead: Mapping[str, nn.Module] | None = None,
    ) -> Seen:
        """Runs one MLP's layer and watches.

        Args:
            mlp: The MLP.
            hidden: [b, n, d], the hidden states in front of its layer.
            where: The sum whose total is wanted, None for none.
            instead: What is called for MLPs of the layer, by their modules' names: what it gives counts.
        """
        seen: dict[str, Any] = {}

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["x"], seen["routing"] = read_call(mlp, args, kwargs)

        def leave(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            seen["y"] = read_output(mlp, y).clone()  # the layer may add to it in place

        def meet(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen["total"] = args[0]

        self._calls(len(hidden))  # before the hooks: it runs the model
        hooks = [
            self._model.get_submodule(mlp.module).register_forward_pre_hook(enter, with_kwargs=True),
            self._model.get_submodule(mlp.output).register_forward_hook(leave),
        ]
        for name, module in (instead or {}).items():
            hooks += self._run_instead(name, module)
        if where is not None and where.module is not None:
            hooks.append(self._model.get_submodule(where.module).register_forward_pre_hook(meet))
        with removed(hooks):
            out = self.run(self.layer_of[mlp.module], hidden)
        total = out if where is not None and where.module is None else seen.get("total")
        return Seen(seen["x"], seen["y"], total, out, seen["routing"])

    def _run_instead(self, name: str, instead: nn.Module) -> list[RemovableHandle]:
        """Hooks by which `instead` gives the output of the MLP whose module is `name`."""
        given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given[:] = [(args, kwargs)]

        def leave(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            args, kwargs = given[0]
            return instead(*args, **kwargs).to(y.dtype).view_as(y)

        return [
            self._model.get_submodule(name).register_forward_pre_hook(enter, with_kwargs=True),
            self._model.get_submodule(self._outputs[name]).register_forward_hook(leave),
        ]

    def find_sum(self, mlp: Placed, hidden: Tensor) -> Sum | None:
        """Where y is added to the rest, found by changing y and looking what changes by as much.

        Args:
            mlp: The MLP.
            hidden: [b, n, d], hidden states in front of its layer to try it on.

        Returns:
            The place, None where there is none: behind a norm of y itself, as in Gemma 2.
        """
        nudge = torch.Generator(device="cpu").manual_seed(0)

        def changed(x: Tensor, y: Tensor) -> Tensor:
            delta = torch.randn(y.shape, generator=nudge).to(y.device, torch.float32)
            return y + (delta * y.float().square().mean().sqrt()).to(y.dtype)

        plain_y, plain = self._inputs_behind(mlp, hidden, None)
        moved_y, moved = self._inputs_behind(mlp, hidden, changed)
        delta = moved_y.float() - plain_y.float()
        rounding = 4 * torch.finfo(hidden.dtype).eps
        for (name, before), (_, after) in zip(plain, moved, strict=True):
            if before.numel() != plain_y.numel() or before.shape[-1] != plain_y.shape[-1]:
                continue
            change = (after.float() - before.float()).view_as(delta)
            if torch.equal(before.view_as(plain_y), plain_y):
                continue  # y itself, on its way
            factor = ((change * delta).sum() / delta.square().sum()).item()
            if factor and (change - factor * delta).norm() <= (
                1e-3 * abs(factor) * delta.norm() + rounding * before.float().norm()
            ):
                return Sum(name, factor)
        return None

    def _inputs_behind(
        self, mlp: Placed, hidden: Tensor, instead: Callable[[Tensor, Tensor], Tensor] | None
    ) -> tuple[Tensor, list[tuple[str | None, Tensor]]]:
        """y, and the input of every module that runs after the MLP in its layer, and the layer's output."""
        behind: list[tuple[str | None, Tensor]] = []
        given: list[Tensor] = []

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if given and args and isinstance(args[0], Tensor):
                behind.append((self._names[id(module)], args[0].clone()))

        def leave(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
            changed = y if instead is None else instead(args[0], y)
            given.append(changed.clone())
            return changed

        self._calls(len(hidden))  # before the hooks: it runs the model
        index = self.layer_of[mlp.module]
        hooks = [part.register_forward_pre_hook(enter) for part in self._layers[index].modules()]
        hooks.append(self._model.get_submodule(mlp.output).register_forward_hook(leave))
        with removed(hooks):
            out = self.run(index, hidden)
        return given[0], [*behind, (None, out)]

    def finish(self, ids: Tensor, hidden: Tensor) -> Any:
        """What the model gives for ids [b, n] where `hidden` [b, n, d] comes out of its last layer."""
        if not self.plain:
            raise Unrepeatable("its layers give more than hidden states")
        with frozen(self._model), self._passed_over(hidden.to(self._model.device, self.dtype)):
            return self._model(input_ids=ids.to(self._model.device))

    @property
    def plain(self) -> bool:
        """Whether layers are known to give hidden states and nothing else."""
        return self._kinds in ({0}, {1})

    @contextmanager
    def _passed_over(self, hidden: Tensor | None = None) -> Iterator[None]:
        """No layer computes anything: each gives `hidden`, or what it got."""

        def instead(*args: Any, **kwargs: Any) -> Any:
            given = _Call.of(args, kwargs)[0] if hidden is None else hidden
            return (given,) if 1 in self._kinds else given

        for layer in self._layers:
            layer.__dict__["forward"] = instead
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.__dict__["forward"]

    def _calls(self, sequences: int) -> list[_Call]:
        """What the layers are called with for so many sequences: with all that is not of the text, as is known, it
        is the same whatever the layers compute."""
        if sequences not in self._extras:
            with self._passed_over() if self.plain else nullcontext():
                self._extras[sequences] = self._catch(self._tokens[:sequences])
        return self._extras[sequences]

    def _catch(self, ids: Tensor, watch: Callable[[int, Tensor, Tensor], None] | None = None) -> list[_Call]:
        """One pass of ids [b, n] through the model's body: what each layer was called with besides hidden states.

        watch: Called with each layer's number, and its hidden states before and after it.
        """
        calls: list[_Call] = []
        orders: list[int] = []
        before: list[Tensor] = []

        def enter(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            orders.append(index)
            hidden, call = _Call.of(args, kwargs)
            calls.append(call)
            before[:] = [hidden if watch is None else hidden.clone()]

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._kinds.add(len(output) if isinstance(output, tuple | list) else 0)
            if watch is not None:
                watch(orders[-1], before.pop(), _hidden(output))

        hooks = [layer.register_forward_hook(leave) for layer in self._layers]
        for index, layer in enumerate(self._layers):
            hooks.append(layer.register_forward_pre_hook(partial(enter, index), with_kwargs=True))
        watch_pass(self._model, ids, hooks)
        if orders != list(range(len(self._layers))):
            raise Unrepeatable("its layers are not run once each and in their order")
        return calls

    def _check(self) -> None:
        """Two texts must get the same extras, and each layer begin where the one before ended. One layer's hidden
        states at a time are held."""
        ids = self._tokens[:1]
        first: list[Tensor] = []
        ended: list[Tensor] = []

        def watch(index: int, hidden: Tensor, output: Tensor) -> None:
            if not index:
                first[:] = [hidden, output.clone()]
            elif not torch.equal(hidden, ended[0]):
                raise Unrepeatable("something happens to the hidden states between its layers")
            ended[:] = [output.clone()]

        calls, others = self._catch(ids, watch), self._catch(ids.roll(1, dims=1))
        self.dtype = first[0].dtype
        for one, two in zip(calls, others, strict=True):
            if not _equal((one.args, one.kwargs), (two.args, two.kwargs)):
                raise Unrepeatable("its layers are given more that depends on the text than hidden states")
        self._extras[1] = calls
        again = self.run(0, first[0].clone())
        if not torch.allclose(again.float(), first[1].float(), rtol=1e-3, atol=1e-3):
            raise Unrepeatable("a layer gives something else when it is run again")


@dataclass
class _Call:
    """What a layer was called with besides hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
        """The hidden states of a call, and all else."""
        if args:
            hidden, rest, named = args[0], args[1:], dict(kwargs)
        else:
            named = dict(kwargs)
            hidden, rest = named.pop("hidden_states", None), ()
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            raise Unrepeatable("its layers do not get hidden states of shape [sequences, tokens, features]")
        return hidden, cls(rest, named)


def _layers_of(model: nn.Module, mlps: Sequence[Placed]) -> tuple[list[nn.Module], dict[str, int]]:
    """The list of layers that holds every MLP, and each MLP's place in it, by its module's name."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    holders: set[str] = set()
    places: dict[str, int] = {}
    for mlp in mlps:
        above = [name for name in lists if mlp.module.startswith(f"{name}.")]
        if not above:
            raise Unrepeatable(f"{mlp.module} is in no list of layers")
        holder = min(above, key=len)
        holders.add(holder)
        places[mlp.module] = int(mlp.module[len(holder) + 1 :].split(".")[0])
    if len(holders) > 1:
        raise Unrepeatable(f"its MLPs are in several lists of layers ({', '.join(sorted(holders))})")
    return list(lists[holders.pop()]), places


def _hidden(output: Any) -> Tensor:
    """The hidden states of a layer's output: itself, or the first of several."""
    first = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(first, Tensor):
        raise Unrepeatable("its layers do not return hidden states")
    return first


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a is b or bool(a == b)


def layer_by_layer(runner: LayerRunner, tokens: Tensor, at_once: int) -> Iterator[Any]:
    """What a model gives for a text, with the layers outermost: each layer's weights are asked for once.

    Args:
        runner: Of the model.
        tokens: [S, n] int64.
        at_once: Sequences in a batch.

    Yields:
        The model's output for each batch, as a pass of it alone would give it.
    """
    batches = tokens.split(at_once)
    states = [runner.embed(ids).cpu() for ids in batches]
    for index in range(len(runner)):
        for at, hidden in enumerate(states):
            states[at] = runner.run(index, hidden.to(runner.device, runner.dtype)).cpu()
    for at, ids in enumerate(batches):
        yield runner.finish(ids, states[at])
        states[at] = torch.empty(0)
