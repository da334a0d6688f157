"""Where a model's MLPs are: found by structure and settled by running them, not by a list of architectures.

Three shapes are known. For an input x [.., d]:

    gated    down(act(gate(x)) * up(x))     gate and up two matrices, or one fused d -> 2f
    plain    down(act(up(x)))               in a module of its own
    loose    down(act(up(x)))               strewn over the layer (OPT), or in a module that wants more (BLOOM)

Which matrices they are is read off the shapes (structure.py); the model is then run on a few random tokens
(trial.py), and each distinct MLP must give down(act(gate x) * up x) from the weights found (formula.py). That
settles which matrix is the gate, the order in a fused one, the biases and the orientation. Attention cannot
pass: it is not token-wise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..runtime.errors import DLRError
from .evaluate import frozen
from .formula import Inside, look_inside
from .structure import Matrix, is_linear, layer_number, module_names, shape_of, sizes_of, structure_of, within
from .trial import Trial

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MLP:
    """One MLP of a model: what a DLRNet takes the place of.

    layer              the number --layers speaks of: the one in the module's path where no other MLP has it,
                       else the position in the list
    module             dotted name of the module whose place the DLRNet takes; its forward's input is x
    identity           modules that become nn.Identity besides, where the MLP has no module of its own
    hidden_size        d
    intermediate_size  f; where the MLP's inside is unknown, the f of a plain MLP of `params` parameters
    gated              whether the original is gated
    act                its activation: the ACT2FN name, else the class name; "unknown" where the inside is
    params             its parameters, biases included
    up, gate, down     its matrices; up and down are None where the inside is unknown or does not compute
                       down(act(gate x) * up x), as with a norm in between
    """

    layer: int
    module: str
    identity: tuple[str, ...]
    hidden_size: int
    intermediate_size: int
    gated: bool
    act: str
    params: int
    up: Matrix | None
    gate: Matrix | None
    down: Matrix | None

    @property
    def output(self) -> str:
        """Dotted name of the module whose forward returns y."""
        return self.identity[-1] if self.identity else self.module


@dataclass(frozen=True)
class TeacherWeights:
    """Float32 matrices of an MLP, a row of up and gate being what one hidden unit reads: up [f, d],
    gate [f, d] or None, down [d, f]. Biases are left out."""

    up: Tensor
    gate: Tensor | None
    down: Tensor


def find_mlps(model: PreTrainedModel, pattern: str | None = None) -> list[MLP]:
    """The model's MLPs, in model order.

    Runs 8 random tokens through the model; MLPs that a pass over text does not reach (those of an image tower)
    are left out. With `pattern`, a regular expression searched for in module names, every matching module that
    maps [.., d] to [.., d] token by token is taken whole, whatever is inside.
    Raises DLRError where none is found, and where an MLP is used more than once in a pass.
    """
    if pattern is not None:
        try:
            wanted = re.compile(pattern)
        except re.error as error:
            raise DLRError(f"--mlps {pattern!r} is not a regular expression: {error}") from error
        whole = [
            name
            for name in module_names(model)
            if wanted.search(name)
            and layer_number(model, name) is not None
            # a norm also maps [.., d] to [.., d]; what has no matrix is no MLP
            and any(p.dim() > 1 for p in model.get_submodule(name).parameters())
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
    if not found:
        raise DLRError(_nothing(model, pattern))
    for mlp in found:
        if calls.count[mlp.module] > 1:
            raise DLRError(
                f"{mlp.module} is used {calls.count[mlp.module]} times in one pass: "
                "a model whose layers share their MLP cannot be locked"
            )
    return _numbered(model, found)


def select_layers(mlps: Sequence[MLP], layers: str | None) -> list[MLP]:
    """The MLPs of the layers named, as in "2-5,9" or "last-6", in model order; all of them for None.

    Raises DLRError for what is not such a list and for a layer that has no MLP.
    """
    if layers is None:
        return list(mlps)
    if last := re.fullmatch(r"\s*last-(\d+)\s*", layers):
        count = int(last[1])
        if not 1 <= count <= len(mlps):
            raise DLRError(f"layers {layers!r}: the model has {len(mlps)} MLPs")
        return list(mlps[-count:])
    wanted: set[int] = set()
    for part in layers.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if ends is None or (ends[2] is not None and int(ends[2]) < int(ends[1])):
            raise DLRError(
                f"layers {layers!r}: {part.strip()!r} is not a layer or a range; write for example 2-5,9 or last-6"
            )
        wanted |= _range(int(ends[1]), int(ends[2] or ends[1]), mlps)
    return [mlp for mlp in mlps if mlp.layer in wanted]


def teacher_weights(model: PreTrainedModel, mlp: MLP) -> TeacherWeights | None:
    """The MLP's own matrices, float32, on the model's device; None where they are not known to make up the MLP."""
    if mlp.up is None or mlp.down is None:
        return None

    def weight(matrix: Matrix) -> Tensor:
        return matrix.weight(model).float().contiguous()

    return TeacherWeights(weight(mlp.up), None if mlp.gate is None else weight(mlp.gate), weight(mlp.down))


def _range(low: int, high: int, mlps: Sequence[MLP]) -> set[int]:
    known = {mlp.layer for mlp in mlps}
    # Compared with the ends first: "0-999999999999" is a typing error, not work to do.
    missing = next((n for n in (high, low) if not min(known) <= n <= max(known)), None)
    missing = (
        missing if missing is not None else next((n for n in range(low, high + 1) if n not in known), None)
    )
    if missing is not None:
        raise DLRError(f"layer {missing} is out of range: the model has MLPs in layers {_ranges(known)}")
    return set(range(low, high + 1))


def _ranges(numbers: set[int]) -> str:
    """{0, 1, 2, 5} -> "0-2,5"."""
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


def _numbered(model: nn.Module, found: list[MLP]) -> list[MLP]:
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    found = sorted(found, key=lambda mlp: order[mlp.module])
    numbers = [layer_number(model, mlp.module) for mlp in found]
    if len(set(numbers)) < len(numbers):
        numbers = list(range(len(found)))
    return [MLP(**{**vars(mlp), "layer": number}) for mlp, number in zip(found, numbers, strict=True)]


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
        return (
            "the model's MLPs are mixtures of experts, which are not supported: only dense MLPs can be locked"
        )
    else:
        said = "the model's MLPs are not recognised"
    return f"{said}; found {there}{more}; name the modules by a pattern such as --mlps 'layers\\.\\d+\\.ffn$'"
