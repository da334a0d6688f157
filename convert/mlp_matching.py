"""What a module computes: linear maps and their sizes, and from which of them down(act(gate x) * up x)."""

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

from ..common.errors import DLRError, first_line
from ..common.hooks import text_inputs
from ..common.weights import awake
from ..triton_kernels.activations import COMMON_ACTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EXPERTS = re.compile(r"(^|\.)(local_)?experts(\.|$)")
# Last part of the name of what may be an activation of no class known to us: act_fn, activation, gelu_impl.
ACT_NAME = re.compile(r"(act|gelu)[^.]*$")


@dataclass(frozen=True)
class Matrix:
    """Rows begin:end of a linear map's [out, in] matrix; end None is the last."""

    name: str
    begin: int = 0
    end: int | None = None

    def weight(self, model: nn.Module) -> Tensor:
        module: Any = awake(model.get_submodule(self.name))
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

    Attributes:
        layer: The number --layers speaks of: the one in the module's path where no other MLP has it, else the
            position in the list.
        module: Dotted name of the module whose place the DLRNet takes; its forward's input is x.
        identity: Modules that become nn.Identity besides, where the MLP has no module of its own.
        hidden_size: d.
        intermediate_size: f; where the MLP's inside is unknown, the f of a plain MLP of `params` parameters.
        gated: Whether the original is gated.
        act: Its activation: the ACT2FN name, else the class name; "unknown" where the inside is.
        params: Its parameters, biases included.
        up, gate, down: Its matrices; up and down are None where the inside is unknown or does not compute
            down(act(gate x) * up x), as with a norm in between.
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
    """Float32 matrices of an MLP, biases left out.

    Attributes:
        up: [f, d], a row being what one hidden unit reads.
        gate: [f, d] likewise, None where the MLP is not gated.
        down: [d, f].
    """

    up: Tensor
    gate: Tensor | None
    down: Tensor


def teacher_weights(model: nn.Module, mlp: MLP) -> TeacherWeights | None:
    """The MLP's own matrices, float32, on the model's device; None where they are not known to make up the MLP."""
    if mlp.up is None or mlp.down is None:
        return None

    def weight(matrix: Matrix) -> Tensor:
        return matrix.weight(model).float().contiguous()

    return TeacherWeights(weight(mlp.up), None if mlp.gate is None else weight(mlp.gate), weight(mlp.down))


def has_experts(model: nn.Module) -> bool:
    """Whether a model has modules that are called experts."""
    return any(_EXPERTS.search(name) for name, _ in model.named_modules())


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def sizes_of(module: Any) -> tuple[int, int]:
    """(in, out) of a linear map."""
    out, width = module.weight.shape
    return (out, width) if isinstance(module, Conv1D) else (width, out)


def module_names(model: nn.Module) -> list[str]:
    """Every module's name, in model order; adapters are passed over, and a mixture's experts, but not an expert that
    all tokens share."""
    return [
        name
        for name, _ in model.named_modules()
        if name and not _EXPERTS.search(name) and "lora_" not in name
    ]


def mixtures(model: nn.Module) -> list[str]:
    """The modules that hold experts of their own, a mixture each; none in a dense model."""
    owners: dict[str, None] = {}
    for name, module in model.named_modules():
        if "Expert" in type(module).__name__ or re.search(r"(^|\.)(local_)?experts$", name):
            owners.setdefault(name.rpartition(".")[0])
    return [name for name in owners if not within(name, [n for n in owners if n != name])]


def layer_number(model: nn.Module, name: str) -> int | None:
    """The layer number in a path: the first index into a ModuleList. None without one, and for the layer itself."""
    parent: nn.Module = model
    *path, _ = name.split(".")
    for part in path:
        if isinstance(parent, nn.ModuleList):
            return int(part)
        parent = parent.get_submodule(part)
    return None


def within(name: str, outer: Sequence[str]) -> bool:
    return any(name == other or name.startswith(other + ".") for other in outer)


def _linears(model: nn.Module, name: str) -> list[str] | None:
    """Names of the linear maps of a module that holds them directly and no other further down."""
    module = model.get_submodule(name)
    direct = [f"{name}.{child}" for child, part in module.named_children() if is_linear(part)]
    return direct if len(direct) == sum(map(is_linear, module.modules())) else None


def shape_of(model: nn.Module, name: str) -> tuple[list[str], str] | None:
    """(the d -> f or d -> 2f maps, the f -> d map) of a module that could be an MLP."""
    linears = _linears(model, name)
    if linears is None or len(linears) not in (2, 3) or not _one_argument(model.get_submodule(name)):
        return None
    sizes = {linear: sizes_of(model.get_submodule(linear)) for linear in linears}
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


def structure_of(module: nn.Module) -> Any:
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


def is_act(module: nn.Module) -> bool:
    return type(module) in _act_classes() or type(module) in (
        nn.GELU,
        nn.SiLU,
        nn.ReLU,
        nn.Sigmoid,
        nn.Tanh,
        nn.Mish,
    )


def act_name(act: Any) -> str:
    """The ACT2FN name of an activation, by its class, else by its values (BLOOM has a gelu of its own)."""
    if type(act) in _act_classes() and type(act) is not nn.SiLU:
        return _act_classes()[type(act)]
    x = torch.linspace(-6, 6, 97)
    try:
        with torch.no_grad():
            y = act(x)
            for name in COMMON_ACTS:
                if torch.allclose(y, ACT2FN[name](x), atol=1e-5):
                    return name
    except (TypeError, RuntimeError):
        pass  # not a function of one tensor on the CPU: it keeps its own name
    return getattr(act, "__name__", type(act).__name__)


@cache
def _act_classes() -> dict[type, str]:
    classes: dict[type, str] = {}
    for name, cls in ACT2CLS.items():
        classes.setdefault(cls[0] if isinstance(cls, tuple) else cls, name)
    return classes


# Tokens of the trial of one module.
_TOKENS = 8
# Pre-activations are brought to this RMS in the trial: at small ones silu(g) * u and g * silu(u) are close.
_RMS = 2.0
# Relative error below which the formula is the MLP; a wrong formula is off by about 1.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_HALF = 2e-2

Act = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Inside:
    """What a trial found; names are relative to the module."""

    d: int
    f: int
    act: str
    gated: bool
    up: Matrix | None = None
    gate: Matrix | None = None
    down: Matrix | None = None


def look_inside(model: nn.Module, name: str, seen: Tensor, by_name: bool) -> Inside | None:
    """Try a module on random tokens. None: not an MLP, or not token-wise."""
    module, d = model.get_submodule(name), seen.shape[-1]
    params = sum(p.numel() for p in module.parameters())
    shape = shape_of(model, name)
    if params == 0 or (shape is not None and sizes_of(model.get_submodule(shape[1]))[1] != d):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _TOKENS, d, generator=generator).to(seen.device, seen.dtype)
    if shape is not None:
        wide = Matrix(shape[0][0])(model, x)
        x = x * (_RMS / wide.square().mean().sqrt().clamp(1e-3, 1e3)).to(x.dtype)
    tolerance = _TOLERANCE.get(seen.dtype, _TOLERANCE_HALF)
    y = _run(module, x)
    alone = [_run(module, x[:, i : i + 1]) for i in range(_TOKENS)]
    if y is None or y.shape != x.shape or any(part is None for part in alone):
        return None
    if _error(torch.cat([part for part in alone if part is not None], 1), y) > tolerance:
        return None  # a token's output depends on its neighbours
    if shape is None:
        return Inside(d, max(1, params // (2 * d)), "unknown", gated=False)
    ups, down = shape
    f, _ = sizes_of(model.get_submodule(down))
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
        return Inside(
            d, f, key, gate is not None, up.within(name), gate and gate.within(name), last.within(name)
        )
    # Something else inside, a norm for one: an MLP that has no formula of ours. Narrow maps are adapters.
    if f > d or by_name:
        gated = len(ups) == 2 or sizes_of(model.get_submodule(ups[0]))[1] == 2 * f
        return Inside(d, f, acts[0][0] if len(acts) == 1 else "unknown", gated)
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
    f = sizes_of(model.get_submodule(down))[0]
    if sizes_of(model.get_submodule(ups[0]))[1] == f:
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
    parts = [p for p in module.children() if is_act(p)]
    parts = parts or [p for n, p in module.named_children() if ACT_NAME.search(n)]
    found: list[Any] = parts or [
        v for n, v in vars(module).items() if ACT_NAME.search(n) and callable(v) and not isinstance(v, type)
    ]
    if found:
        return [(act_name(act), act) for act in found]
    return [(name, ACT2FN[name]) for name in COMMON_ACTS]


def trial_tokens(model: PreTrainedModel) -> Tensor:
    """8 random tokens of a model, [1, 8] int64. Raises DLRError, in a line, where it takes no text."""
    if model.main_input_name != "input_ids":
        raise DLRError(
            f"a {type(model).__name__} reads {model.main_input_name}, and calibration is on text alone: only models "
            "that read text can be locked"
        )
    try:
        table = model.get_input_embeddings()
        rows = len(table.weight)
    except (NotImplementedError, AttributeError, TypeError) as error:
        raise DLRError(
            f"a {type(model).__name__} takes no text: only language models can be locked"
        ) from error
    return torch.randint(rows, (1, _TOKENS), generator=torch.Generator().manual_seed(0))


def one_pass(model: PreTrainedModel) -> None:
    """Runs 8 random tokens through a model. Raises DLRError, in a line, where it does not take text alone."""
    ids = trial_tokens(model)
    try:
        model(**text_inputs(model, ids))
    except Exception as error:
        raise DLRError(f"the model does not run on text alone: {first_line(error)}") from error
