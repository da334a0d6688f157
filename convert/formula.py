"""What a module computes: whether it is token-wise, and from which matrices down(act(gate x) * up x)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .structure import ACT_NAME, COMMON_ACTS, Matrix, act_name, is_act, shape_of, sizes_of

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
