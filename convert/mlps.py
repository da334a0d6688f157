"""Where a model's MLPs are: found by structure and settled by running them, not by a list of architectures.

Three shapes are known. For an input x [.., d]:

    gated    down(act(gate(x)) * up(x))     gate and up two matrices, or one fused d -> 2f
    plain    down(act(up(x)))               in a module of its own
    loose    down(act(up(x)))               strewn over the layer (OPT), or in a module that wants more (BLOOM)

Which matrices they are is read off the shapes; the model is then run on a few random tokens, and each distinct
MLP must give down(act(gate x) * up x) from the weights found. That settles which matrix is the gate, the order
in a fused one, the biases and the orientation. Attention cannot pass: it is not token-wise.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS, ACT2FN
from transformers.pytorch_utils import Conv1D

from ..runtime.errors import DLRError
from .evaluate import frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of the trial pass, and of the trial of one MLP.
_TRIAL_TOKENS = 8
# Pre-activations are brought to this RMS in the trial: at small ones silu(g) * u and g * silu(u) are close.
_TRIAL_RMS = 2.0
# Relative error below which the formula is the MLP; a wrong formula is off by about 1.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_HALF = 2e-2
# Activations to try where a module holds none (it calls a function).
_COMMON_ACTS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu", "sigmoid", "tanh", "mish")
# Last part of the name of what may be an activation of no class known to us: act_fn, activation, gelu_impl.
_ACT_NAME = re.compile(r"(act|gelu)[^.]*$")

Act = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Matrix:
    """Rows begin:end of a linear map's [out, in] matrix; end None is the last."""

    name: str
    begin: int = 0
    end: int | None = None

    def weight(self, model: nn.Module) -> Tensor:
        module: Any = model.get_submodule(self.name)
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        return weight.detach()[self.begin : self.end]

    def within(self, outer: str) -> Matrix:
        """The same, named from inside the module `outer`."""
        return Matrix(self.name.removeprefix(outer + "."), self.begin, self.end)

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        """x [.., in] -> [.., rows], float32, bias included."""
        bias: Tensor | None = getattr(model.get_submodule(self.name), "bias", None)
        y = x.float() @ self.weight(model).float().T
        return y if bias is None else y + bias.detach()[self.begin : self.end].float()


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

    @property
    def reads(self) -> Tensor:
        """[f, d], the rows under the activation: the gate's where there is one, else up's."""
        return self.up if self.gate is None else self.gate


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
        whole = [name for name in _names(model) if wanted.search(name) and _number(model, name) is not None]
    else:
        wanted = None
        whole = [
            name for name in _names(model) if _number(model, name) is not None and _shape_of(model, name)
        ]
    with frozen(model):
        calls = _Trial(model, whole)
        verdicts: dict[Any, _Inside | None] = {}
        found: list[MLP] = []
        taken: list[str] = []
        for name in whole:
            if _within(name, taken) or not calls.single_tensor(name):
                continue
            key = _structure(model.get_submodule(name))
            if key not in verdicts:
                verdicts[key] = _look_inside(model, name, calls.inputs[name], by_name=wanted is not None)
            inside = verdicts[key]
            if inside is None:
                continue
            found.append(_mlp(model, name, (), inside))
            taken.append(name)
        if wanted is None:
            found += calls.loose(taken)
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
    """The MLPs of the layers named, as in "2-5,9", in model order; all of them for None.

    Raises DLRError for what is not such a list and for a layer that has no MLP.
    """
    if layers is None:
        return list(mlps)
    wanted: set[int] = set()
    for part in layers.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if ends is None or (ends[2] is not None and int(ends[2]) < int(ends[1])):
            raise DLRError(
                f"layers {layers!r}: {part.strip()!r} is not a layer or a range; write for example 2-5,9"
            )
        wanted |= _range(int(ends[1]), int(ends[2] or ends[1]), mlps)
    return [mlp for mlp in mlps if mlp.layer in wanted]


def teacher_weights(model: PreTrainedModel, mlp: MLP) -> TeacherWeights:
    """The MLP's own matrices, float32, on the model's device.

    Raises DLRError where they are not known to make up the MLP.
    """
    if mlp.up is None or mlp.down is None:
        raise DLRError(
            f"{mlp.module} is not a plain MLP (something besides its matrices and activation is inside): "
            "an aligned start needs one; use --start random"
        )

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


# What a module looks like from outside.


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _sizes(module: Any) -> tuple[int, int]:
    """(in, out) of a linear map."""
    out, width = module.weight.shape
    return (out, width) if isinstance(module, Conv1D) else (width, out)


def _names(model: nn.Module) -> list[str]:
    """Every module's name, in model order; experts and adapters are passed over."""
    return [
        name for name, _ in model.named_modules() if name and "expert" not in name and "lora_" not in name
    ]


def _number(model: nn.Module, name: str) -> int | None:
    """The layer number in a path: the first index into a ModuleList. None without one, and for the layer itself."""
    parent: nn.Module = model
    *path, _ = name.split(".")
    for part in path:
        if isinstance(parent, nn.ModuleList):
            return int(part)
        parent = parent.get_submodule(part)
    return None


def _within(name: str, outer: Sequence[str]) -> bool:
    return any(name == other or name.startswith(other + ".") for other in outer)


def _linears(model: nn.Module, name: str) -> list[str] | None:
    """Names of the linear maps of a module that holds them directly and no other further down."""
    module = model.get_submodule(name)
    direct = [f"{name}.{child}" for child, part in module.named_children() if _linear(part)]
    return direct if len(direct) == sum(map(_linear, module.modules())) else None


def _shape_of(model: nn.Module, name: str) -> tuple[list[str], str] | None:
    """(the d -> f or d -> 2f maps, the f -> d map) of a module that could be an MLP."""
    linears = _linears(model, name)
    if linears is None or len(linears) not in (2, 3) or not _one_argument(model.get_submodule(name)):
        return None
    sizes = {linear: _sizes(model.get_submodule(linear)) for linear in linears}
    for down in reversed(linears):
        f, d = sizes[down]
        ups = [linear for linear in linears if linear != down]
        if all(sizes[up] == (d, f) for up in ups) or (len(ups) == 1 and sizes[ups[0]] == (d, 2 * f)):
            return ups, down
    return None


def _one_argument(module: nn.Module) -> bool:
    parameters = list(inspect.signature(module.forward).parameters.values())
    needed = [
        p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return bool(parameters) and len(needed) <= 1


def _structure(module: nn.Module) -> Any:
    """Equal for modules that differ in their numbers alone: one trial does for all of them."""
    parts = tuple(
        (name, type(part), tuple((n, tuple(p.shape)) for n, p in part.named_parameters(recurse=False)))
        for name, part in module.named_modules()
    )
    # A setting such as Gemma 3n's activation sparsity differs from layer to layer.
    settings = {
        n: v for n, v in vars(module).items() if isinstance(v, bool | int | float | str) and "idx" not in n
    }
    return parts, tuple(sorted(settings.items()))


# What it computes.


@dataclass(frozen=True)
class _Inside:
    """What a trial found; names are relative to the module."""

    d: int
    f: int
    act: str
    gated: bool
    up: Matrix | None = None
    gate: Matrix | None = None
    down: Matrix | None = None


def _look_inside(model: nn.Module, name: str, seen: Tensor, by_name: bool) -> _Inside | None:
    """Try a module on random tokens. None: not an MLP, or not token-wise."""
    module, d = model.get_submodule(name), seen.shape[-1]
    params = sum(p.numel() for p in module.parameters())
    shape = _shape_of(model, name)
    if params == 0 or (shape is not None and _sizes(model.get_submodule(shape[1]))[1] != d):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _TRIAL_TOKENS, d, generator=generator).to(seen.device, seen.dtype)
    if shape is not None:
        wide = Matrix(shape[0][0])(model, x)
        x = x * (_TRIAL_RMS / wide.square().mean().sqrt().clamp(1e-3, 1e3)).to(x.dtype)
    tolerance = _TOLERANCE.get(seen.dtype, _TOLERANCE_HALF)
    y = _run(module, x)
    alone = [_run(module, x[:, i : i + 1]) for i in range(_TRIAL_TOKENS)]
    if y is None or y.shape != x.shape or any(part is None for part in alone):
        return None
    if _error(torch.cat([part for part in alone if part is not None], 1), y) > tolerance:
        return None  # a token's output depends on its neighbours
    if shape is None:
        return _Inside(d, max(1, params // (2 * d)), "unknown", gated=False)
    ups, down = shape
    f, _ = _sizes(model.get_submodule(down))
    acts = _acts(module)
    best = min(
        (
            (_error(_formula(model, x, *matrices, act), y), matrices, key)
            for matrices in _roles(model, ups, down)
            for key, act in acts
        ),
        key=lambda trial: trial[0],
    )
    if best[0] <= tolerance:
        (up, gate, last), key = best[1:]
        return _Inside(
            d, f, key, gate is not None, up.within(name), gate and gate.within(name), last.within(name)
        )
    # Something else inside, a norm for one: an MLP that has no formula of ours. Narrow maps are adapters.
    if f > d or by_name:
        gated = len(ups) == 2 or _sizes(model.get_submodule(ups[0]))[1] == 2 * f
        return _Inside(d, f, acts[0][0] if len(acts) == 1 else "unknown", gated)
    return None


def _run(module: nn.Module, x: Tensor) -> Tensor | None:
    try:
        y = module(x.clone())
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError):
        return None  # it wants something else than [1, n, d]
    return y if isinstance(y, Tensor) else None


def _roles(model: nn.Module, ups: list[str], down: str) -> Iterator[tuple[Matrix, Matrix | None, Matrix]]:
    """The ways to read the matrices as (up, gate, down); where all fit (zero weights), the first is taken."""
    last = Matrix(down)
    if len(ups) == 2:
        gate, up = sorted(ups, key=lambda linear: "gate" not in linear.rpartition(".")[2])
        yield Matrix(up), Matrix(gate), last
        yield Matrix(gate), Matrix(up), last
        return
    f = _sizes(model.get_submodule(down))[0]
    if _sizes(model.get_submodule(ups[0]))[1] == f:
        yield Matrix(ups[0]), None, last
    else:
        first, second = Matrix(ups[0], 0, f), Matrix(ups[0], f, 2 * f)
        yield second, first, last
        yield first, second, last


def _formula(model: nn.Module, x: Tensor, up: Matrix, gate: Matrix | None, down: Matrix, act: Act) -> Tensor:
    """[1, n, d]: down(act(gate x) * up x), or down(act(up x))."""
    return down(model, act(up(model, x)) if gate is None else act(gate(model, x)) * up(model, x))


def _error(y: Tensor, wanted: Tensor) -> float:
    """Relative error in the Frobenius norm; 0 where both vanish."""
    gap, size = (y - wanted).float().norm().item(), wanted.float().norm().item()
    return 0.0 if gap == 0 else gap / max(size, 1e-30)


def _acts(module: nn.Module) -> list[tuple[str, Act]]:
    """(name, function) of a module's activation: a child of its, an attribute, else the usual ones."""
    parts = [p for p in module.children() if _is_act(p)]
    parts = parts or [p for n, p in module.named_children() if _ACT_NAME.search(n)]
    found: list[Any] = parts or [
        v for n, v in vars(module).items() if _ACT_NAME.search(n) and callable(v) and not isinstance(v, type)
    ]
    if found:
        return [(_act_name(act), act) for act in found]
    return [(name, ACT2FN[name]) for name in _COMMON_ACTS]


@cache
def _act_classes() -> dict[type, str]:
    classes: dict[type, str] = {}
    for name, cls in ACT2CLS.items():
        classes.setdefault(cls[0] if isinstance(cls, tuple) else cls, name)
    return classes


def _is_act(module: nn.Module) -> bool:
    return type(module) in _act_classes() or type(module) in (
        nn.GELU,
        nn.SiLU,
        nn.ReLU,
        nn.Sigmoid,
        nn.Tanh,
        nn.Mish,
    )


def _act_name(act: Any) -> str:
    """The ACT2FN name of an activation, by its class, else by its values (BLOOM has a gelu of its own)."""
    if type(act) in _act_classes() and type(act) is not nn.SiLU:
        return _act_classes()[type(act)]
    x = torch.linspace(-6, 6, 97)
    try:
        with torch.no_grad():
            y = act(x)
            for name in _COMMON_ACTS:
                if torch.allclose(y, ACT2FN[name](x), atol=1e-5):
                    return name
    except (TypeError, RuntimeError):
        pass  # not a function of one tensor on the CPU: it keeps its own name
    return getattr(act, "__name__", type(act).__name__)


# One pass through the model.


class _Trial:
    """What modules get and give in one pass of 8 random tokens through the model.

    count       calls of each module watched
    inputs      their first input
    """

    def __init__(self, model: PreTrainedModel, whole: Sequence[str]) -> None:
        self.model = model
        self.count: dict[str, int] = {}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.odd: set[str] = set()  # called with anything else than one tensor, or by keyword
        names = [n for n in _names(model) if _number(model, n) is not None]
        # Linear maps, and what may be an activation: ends and middle of a loose MLP.
        parts = {n: model.get_submodule(n) for n in names}
        small = [n for n, p in parts.items() if _linear(p) or _is_act(p) or not list(p.parameters())]
        hooks = []
        for name in {*whole, *small}:
            self.count[name] = 0
            hooks.append(model.get_submodule(name).register_forward_hook(self._hook(name), with_kwargs=True))
        try:
            _one_pass(model)
        finally:
            for hook in hooks:
                hook.remove()

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

    def loose(self, taken: Sequence[str]) -> list[MLP]:
        """MLPs without a module of their own: an activation between what one linear map gives and another gets."""
        parts = [n for n in self.inputs if n not in self.odd and not _within(n, taken)]
        linears = [n for n in parts if _linear(self.model.get_submodule(n))]
        found = []
        for act in parts:
            module = self.model.get_submodule(act)
            if _linear(module) or not (_is_act(module) or _ACT_NAME.search(act)):
                continue
            layer = [n for n in linears if _prefix(n) == _prefix(act)]
            first = [n for n in layer if _same(self.outputs[n], self.inputs[act])]
            second = [n for n in layer if _same(self.outputs[act], self.inputs[n])]
            if len(first) != 1 or len(second) != 1:
                continue
            (d, f), sizes = (
                _sizes(self.model.get_submodule(first[0])),
                _sizes(self.model.get_submodule(second[0])),
            )
            if sizes == (f, d):
                inside = _Inside(d, f, _act_name(module), False, Matrix(first[0]), None, Matrix(second[0]))
                found.append(_mlp(self.model, first[0], (act, second[0]), inside))
        return found


def _one_pass(model: PreTrainedModel) -> None:
    table = model.get_input_embeddings()
    rows, device = table.weight.shape[0], table.weight.device
    ids = torch.randint(rows, (1, _TRIAL_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    # An encoder-decoder is fed on both sides.
    both = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    try:
        model(input_ids=ids, **both)
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise DLRError(f"the model does not run on text alone: {reason[0]}") from error


def _same(a: Tensor, b: Tensor) -> bool:
    """The same values: the tensor itself, or a copy, as dropout may make. (Both are kept alive, so the same
    address is the same tensor, even where the activation then wrote over it.)"""
    if a.numel() != b.numel() or a.dtype != b.dtype:
        return False
    return a.data_ptr() == b.data_ptr() or torch.equal(a.flatten(), b.flatten())


def _prefix(name: str) -> str:
    """The path up to its first number."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else ""


def _mlp(model: nn.Module, module: str, identity: tuple[str, ...], inside: _Inside) -> MLP:
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
    numbers = [_number(model, mlp.module) for mlp in found]
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
            if _linear(part)
            for width, out in [_sizes(part)]
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
