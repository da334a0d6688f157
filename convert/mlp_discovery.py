"""Where a model's MLPs are: found by structure and settled by running them, not by a list of architectures.

Three shapes are known. For an input x [.., d]:

    gated    down(act(gate(x)) * up(x))     gate and up two matrices, or one fused d -> 2f
    plain    down(act(up(x)))               in a module of its own
    loose    down(act(up(x)))               strewn over the layer (OPT), or in a module that wants more (BLOOM)

Which matrices they are is read off the shapes (`shape_of`); the model is then run on a few random tokens (`Trial`),
and each distinct MLP must give down(act(gate x) * up x) from the weights found (`look_inside`). That settles which
matrix is the gate, the order in a fused one, the biases and the orientation. Attention cannot pass: it is not
token-wise. `mlp_matching.py` holds what needs one module alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..common.errors import DLRError
from ..common.hooks import frozen, removed
from .experts.routing import Mixture, find_mixtures
from .mlp_matching import (
    ACT_NAME,
    MLP,
    Inside,
    Matrix,
    act_name,
    is_act,
    is_linear,
    layer_number,
    look_inside,
    mixtures,
    module_names,
    one_pass,
    shape_of,
    sizes_of,
    structure_of,
    within,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_mlps(model: PreTrainedModel, pattern: str | None = None) -> list[MLP]:
    """The model's MLPs, found by running 8 random tokens through it.

    MLPs that a pass over text does not reach (those of an image tower) are left out.

    Args:
        model: Any transformers model.
        pattern: A regular expression searched for in module names, with which every matching module that maps
            [.., d] to [.., d] token by token is taken whole, whatever is inside; None for recognition by structure.

    Returns:
        The MLPs, in model order.

    Raises:
        DLRError: Where none is found, and where an MLP is used more than once in a pass.
    """
    experts = mixtures(model)
    routed = mixtures_in(model, pattern)
    if pattern is not None:
        wanted = named_by(pattern)
        whole = [
            name
            for name in module_names(model)
            if wanted.search(name)
            and layer_number(model, name) is not None
            # a norm also maps [.., d] to [.., d]; what has no matrix is no MLP
            and any(p.dim() > 1 for p in model.get_submodule(name).parameters())
            and not any(within(mixture, [name]) for mixture in experts)
        ]
    else:
        wanted = None
        whole = [
            name
            for name in module_names(model)
            if layer_number(model, name) is not None and shape_of(model, name)
        ]
    with frozen(model):
        calls = Trial(model, whole)
        verdicts: dict[Any, Inside | None] = {}
        found: list[MLP] = []
        taken: list[str] = []
        for name in whole:
            if within(name, taken) or not calls.single_tensor(name):
                continue
            key = structure_of(model.get_submodule(name))
            if key not in verdicts:
                verdicts[key] = look_inside(model, name, calls.inputs[name], by_name=wanted is not None)
            inside = verdicts[key]
            if inside is None:
                continue
            found.append(_mlp(model, name, (), inside))
            taken.append(name)
        if wanted is None:
            found += [_mlp(model, name, parts, inside) for name, parts, inside in calls.loose(taken)]
    found += routed
    if not found:
        raise DLRError(_nothing(model, pattern))
    check_used_once(found, calls.count)
    return numbered(model, found)


def check_used_once(mlps: Sequence[MLP], calls: Mapping[str, int]) -> None:
    """Raises DLRError where a pass calls an MLP more than once. calls: how often, by the modules' names."""
    for mlp in mlps:
        if calls.get(mlp.module, 1) > 1:
            raise DLRError(
                f"{mlp.module} is used {calls[mlp.module]} times in one pass: "
                "a model whose layers share their MLP cannot be locked"
            )


def named_by(pattern: str) -> re.Pattern[str]:
    """--mlps as it is searched for in module names. Raises DLRError where it is no regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise DLRError(f"--mlps {pattern!r} is not a regular expression: {error}") from error


def mixtures_in(model: PreTrainedModel, pattern: str | None) -> list[Mixture]:
    """The mixtures of a model that can be locked, of those that a pattern names; None for all."""
    found = find_mixtures(model)[0] if mixtures(model) else []
    if pattern is None:
        return found
    wanted = named_by(pattern)
    return [m for m in found if any(wanted.search(n) for n in (m.module, m.module.rpartition(".")[0]))]


def check_dense(
    model: PreTrainedModel, mlps: Sequence[MLP], *, layers: str | None, pattern: str | None
) -> str | None:
    """Whether a lock of the MLPs found leaves none of those out that were meant.

    A model whose other MLPs are mixtures of experts of an unknown kind is locked in what is known only where the caller
    names the layers: an owner who asks for a lock of the model would else get one of a few layers.

    Args:
        model: Any transformers model.
        mlps: Its MLPs, as `find_mlps` found them.
        layers, pattern: What was asked for, as `select_layers` and `find_mlps` take it.

    Returns:
        What stays as it is, a sentence; None where that is nothing.

    Raises:
        DLRError: Where mixtures were meant, too.
    """
    experts = unknown_mixtures(model, mlps)
    if not experts:
        return None
    count = len(experts) + len(mlps)
    if layers is None and any(pattern is None or re.search(pattern, name) for name in experts):
        raise DLRError(
            f"{len(experts)} of the model's {count} MLPs are mixtures of experts of a kind that cannot be locked "
            f"({', '.join(_kinds(model, experts))}): to lock the others alone, name their layers, "
            f"--layers {ranges({mlp.layer for mlp in mlps})}"
        )
    held = sum(p.numel() for name in experts for p in model.get_submodule(name).parameters())
    held -= sum(mlp.params for mlp in mlps if within(mlp.module, experts))
    return (
        f"{len(experts)} of the model's {count} MLPs are mixtures of experts and are not locked: "
        f"{100 * held / model.num_parameters():.0f}% of the original's parameters, as trainable as before"
    )


def unknown_mixtures(model: nn.Module, mlps: Sequence[MLP]) -> list[str]:
    """The mixtures of a model that are not among its MLPs found."""
    known = [mlp.module for mlp in mlps if isinstance(mlp, Mixture)]
    return [name for name in mixtures(model) if not any(within(module, [name]) for module in known)]


def _kinds(model: nn.Module, experts: Sequence[str]) -> list[str]:
    """The classes of mixtures, each once."""
    return sorted({type(model.get_submodule(name)).__name__ for name in experts})


class _Placed(Protocol):
    @property
    def layer(self) -> int: ...


_P = TypeVar("_P", bound=_Placed)  # an MLP, or what is known of a layer


def select_layers(mlps: Sequence[_P], layers: str | None) -> list[_P]:
    """The MLPs of the layers named, as in "2-5,9" or "last-6", in model order; all of them for None.

    Raises:
        DLRError: On what is not such a list, and on a layer that has no MLP.
    """
    if layers is None:
        return list(mlps)
    if last := re.fullmatch(r"\s*last-(\d+)\s*", layers):
        count, numbers = int(last[1]), sorted({mlp.layer for mlp in mlps})
        check_count(layers, count, set(numbers))
        return [mlp for mlp in mlps if mlp.layer in numbers[-count:]]
    wanted: set[int] = set()
    for part in layers.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if ends is None or (ends[2] is not None and int(ends[2]) < int(ends[1])):
            raise DLRError(
                f"layers {layers!r}: {part.strip()!r} is not a layer or a range; write for example 2-5,9 or auto:6"
            )
        wanted |= _range(int(ends[1]), int(ends[2] or ends[1]), mlps)
    return [mlp for mlp in mlps if mlp.layer in wanted]


def _range(low: int, high: int, mlps: Sequence[_Placed]) -> set[int]:
    known = {mlp.layer for mlp in mlps}
    # Compared with the ends first: "0-999999999999" is a typing error, not work to do.
    missing = next((n for n in (high, low) if not min(known) <= n <= max(known)), None)
    missing = (
        missing if missing is not None else next((n for n in range(low, high + 1) if n not in known), None)
    )
    if missing is not None:
        raise DLRError(f"layer {missing} is out of range: the model has MLPs in layers {ranges(known)}")
    return set(range(low, high + 1))


def automatic(layers: str | None) -> int | None:
    """N of "auto:N", the N layers that cost the model least; None where layers are named."""
    found = re.fullmatch(r"\s*auto:\s*(\d+)\s*", layers or "")
    return int(found[1]) if found else None


def stand_ins(mlps: Sequence[MLP], layers: str | None) -> list[MLP]:
    """As `select_layers`; of "auto:N" the middle N layers, for what depends little on which they are.

    Raises:
        DLRError: As `select_layers`, and where the model has no N layers.
    """
    if (count := automatic(layers)) is None:
        return select_layers(mlps, layers)
    numbers = {mlp.layer for mlp in mlps}
    check_count(layers, count, numbers)
    return select_layers(mlps, middle(numbers, count))


def check_count(layers: str | None, count: int, numbers: set[int]) -> None:
    """Raises DLRError where `layers`, as a user wrote them, are none or more than a model has."""
    if not 1 <= count <= len(numbers):
        raise DLRError(f"layers {layers!r}: the model has MLPs in {len(numbers)} layers")


def middle(layers: Iterable[int], count: int) -> str:
    """The middle `count` of some layers, as `select_layers` takes them; the first and the last cost a model most."""
    numbers = sorted(set(layers))
    begin = (len(numbers) - count) // 2
    return ranges(set(numbers[begin : begin + count]))


def ranges(numbers: set[int]) -> str:
    """The numbers of layers as `select_layers` takes them: {0, 1, 2, 5} -> "0-2,5"."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and parts[-1][-1] == n - 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _mlp(model: nn.Module, module: str, identity: tuple[str, ...], inside: Inside) -> MLP:
    def absolute(matrix: Matrix | None) -> Matrix | None:
        return matrix and Matrix(f"{module}.{matrix.name}", matrix.begin, matrix.end)

    matrices = [inside.up, inside.gate, inside.down]
    if not identity:
        matrices = [absolute(m) for m in matrices]
    parts = (module, *identity)
    return MLP(
        layer=-1,
        module=module,
        identity=identity,
        hidden_size=inside.d,
        intermediate_size=inside.f,
        gated=inside.gated,
        act=inside.act,
        params=sum(p.numel() for part in parts for p in model.get_submodule(part).parameters()),
        up=matrices[0],
        gate=matrices[1],
        down=matrices[2],
    )


def numbered(model: nn.Module, found: list[MLP]) -> list[MLP]:
    """The MLPs in model order, each with its layer."""
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    found = sorted(found, key=lambda mlp: order[mlp.module])
    numbers = [layer_number(model, mlp.module) for mlp in found]
    # An encoder's layer 0 and a decoder's are two layers; a mixture and the MLP beside it are in one.
    if len({(_prefix(mlp.module), n) for mlp, n in zip(found, numbers, strict=True)}) > len(set(numbers)):
        numbers = list(range(len(found)))
    return [
        replace(mlp, layer=0 if number is None else number)
        for mlp, number in zip(found, numbers, strict=True)
    ]


def _nothing(model: nn.Module, pattern: str | None) -> str:
    """Why no MLP was found, what there is instead, and how to name it."""
    holders: dict[str, str] = {}
    for name, module in model.named_modules():
        linears = [
            f"{child} {width}->{out}"
            for child, part in module.named_children()
            if is_linear(part)
            for width, out in [sizes_of(part)]
        ]
        if linears:
            holders.setdefault(re.sub(r"\.\d+(?=\.|$)", ".N", name) or "(the model)", ", ".join(linears))
    there = "; ".join(f"{name} ({linears})" for name, linears in list(holders.items())[:6])
    more = f"; {len(holders) - 6} more" if len(holders) > 6 else ""
    if pattern is not None:
        said = f"no module that --mlps {pattern!r} matches maps [.., d] to [.., d] token by token"
    elif any("experts" in name for name, _ in [*model.named_modules(), *model.named_parameters()]):
        kinds = ", ".join(_kinds(model, mixtures(model)))
        return f"the model's MLPs are mixtures of experts of a kind that cannot be locked ({kinds})"
    else:
        said = "the model's MLPs are not recognised"
    return f"{said}; found {there}{more}; name the modules by a pattern such as --mlps 'layers\\.\\d+\\.ffn$'"


class Trial:
    """What modules get and give in one pass of 8 random tokens through the model.

    Attributes:
        count: Calls of each module watched, by name.
        inputs, outputs: The first input and the output of those that map one tensor to one.
        odd: Modules that were called with anything else than one tensor, or by keyword.
    """

    def __init__(self, model: PreTrainedModel, whole: Sequence[str]) -> None:
        self.model = model
        self.count: dict[str, int] = {}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.odd: set[str] = set()  # called with anything else than one tensor, or by keyword
        names = [n for n in module_names(model) if layer_number(model, n) is not None]
        # Linear maps, and what may be an activation: ends and middle of a loose MLP.
        parts = {n: model.get_submodule(n) for n in names}
        small = [n for n, p in parts.items() if is_linear(p) or is_act(p) or not list(p.parameters())]
        hooks = []
        for name in {*whole, *small}:
            self.count[name] = 0
            hooks.append(model.get_submodule(name).register_forward_hook(self._hook(name), with_kwargs=True))
        with removed(hooks):
            one_pass(model)

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.count[name] += 1
            tensors = [a for a in (*args, *kwargs.values()) if a is not None]
            if (
                len(tensors) != 1
                or not args
                or not isinstance(args[0], Tensor)
                or not isinstance(output, Tensor)
            ):
                self.odd.add(name)
                return
            self.inputs[name], self.outputs[name] = args[0], output

        return hook

    def single_tensor(self, name: str) -> bool:
        """Whether the pass came through the module, with one tensor in and one of its shape out."""
        if name in self.odd or name not in self.inputs:
            return False
        return self.inputs[name].shape == self.outputs[name].shape and self.inputs[name].is_floating_point()

    def loose(self, taken: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...], Inside]]:
        """MLPs without a module of their own: an activation between what one linear map gives and another gets.

        Yields (the first map, the activation and the second map, what they compute), names absolute.
        """
        parts = [n for n in self.inputs if n not in self.odd and not within(n, taken)]
        linears = [n for n in parts if is_linear(self.model.get_submodule(n))]
        for act in parts:
            module = self.model.get_submodule(act)
            if is_linear(module) or not (is_act(module) or ACT_NAME.search(act)):
                continue
            layer = [n for n in linears if _prefix(n) == _prefix(act)]
            first = [n for n in layer if _same(self.outputs[n], self.inputs[act])]
            second = [n for n in layer if _same(self.outputs[act], self.inputs[n])]
            if len(first) != 1 or len(second) != 1:
                continue
            d, f = sizes_of(self.model.get_submodule(first[0]))
            if sizes_of(self.model.get_submodule(second[0])) == (f, d):
                inside = Inside(d, f, act_name(module), False, Matrix(first[0]), None, Matrix(second[0]))
                yield first[0], (act, second[0]), inside


def _same(a: Tensor, b: Tensor) -> bool:
    """The same values: the tensor itself, or a copy, as dropout may make, of which zeros say nothing. (Both are kept
    alive, so the same address is the same tensor, even where the activation then wrote over it.)"""
    if a.numel() != b.numel() or a.dtype != b.dtype:
        return False
    return a.data_ptr() == b.data_ptr() or (bool(a.any()) and torch.equal(a.flatten(), b.flatten()))


def _prefix(name: str) -> str:
    """The path up to its first number."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else ""
