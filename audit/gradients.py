"""How wrong the gradients are that training through locked layers follows, on held-out neutral text.

Module level: at what goes into the original's MLP, the products of random cotangents with the Jacobians of the chain
and of the MLP. Model level: the gradient of the loss by every weight that both models have, on the same tokens.

A chain is fitted to the MLP's values, and nothing asks its slopes to agree: by hand, a chain of value error 0.165 had
gradients of error 0.59 and cosine 0.64. Its student is measured beside it: what going forward through the chain and
back through the student would give (straight-through).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ..common.errors import DLRError
from ..common.hooks import first_argument, frozen, removed, run_body
from ..convert.evaluate import mean_error, relative_error
from ..convert.mlp_matching import MLP
from ..reporting import Section, Table, headings
from ..reporting.words import cell
from ..runtime import DLRNet
from ..triton_kernels import backend, chain_reference
from .attacks.fine_tune import task_loss
from .context import AuditContext
from .report import AuditReport, GradientError
from .strategies.model import layer_of

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

TOKENS = 2048  # of held-out text, at most
WHOLE, OUTSIDE = "all weights outside the chains", "outside the layers"


def module_gradients(
    context: AuditContext, students: Mapping[str, nn.Module], name: str
) -> Iterator[GradientError]:
    """Every locked module's chain, and its student, against the original's MLP, at what goes into the MLP in the
    original.

    Args:
        context: The models and the text.
        students: What stands in modules' places, by module; the experts of a mixture together, as it routes them.
        name: What the students are called.

    Yields:
        A row for each module, in the order of the model, and after it one for its student.
    """
    rows = context.neutral.heldout
    ids = rows[: max(1, TOKENS // rows.shape[1])]
    generator = torch.Generator().manual_seed(context.config.seed)
    found: dict[str, dict[str, _Compared]] = {}
    for mlp in context.mlps:
        made: dict[str, nn.Module] = {mlp.module: context.locked.get_submodule(mlp.module)}
        if mlp.module in students:
            made[f"{mlp.module}, {name}"] = students[mlp.module]
        found[mlp.module] = {label: _Compared(net) for label, net in made.items()}
    for number, sequence in enumerate(ids):
        context.progress("gradients of the chains", number, len(ids))
        hooks = [
            hook
            for mlp in context.mlps
            for hook in _watched(context, mlp, generator, found[mlp.module].values())
        ]
        with removed(hooks), frozen(context.original):
            run_body(context.original, sequence[None])
    context.progress("gradients of the chains", len(ids), len(ids))
    for rows_of_module in found.values():
        for label, compared in rows_of_module.items():
            yield GradientError(label, compared.error, compared.cosine, ids.numel(), compared.value_error)


class _Compared:
    """What is known of one stand-in of an MLP, a figure a token."""

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._errors: list[Tensor] = []
        self._cosines: list[Tensor] = []
        self._values: list[Tensor] = []

    def run(self, x: Tensor, routing: Sequence[Tensor]) -> Tensor:
        """The output for x [T, d], of a mixture by the original's routing."""
        if isinstance(self._net, DLRNet):  # may be on another device
            return chain_reference(x, self._net.chain.to(x.device, x.dtype))
        with backend("naive"):
            return self._net(x, *routing)

    def add(self, ours: Tensor, theirs: Tensor, y: Tensor, wanted: Tensor) -> None:
        """Gradients and outputs of chain and MLP, [T, d] each."""
        self._errors.append(relative_error(ours, theirs).cpu())
        self._cosines.append(cosine_similarity(ours, theirs, dim=1).cpu())
        self._values.append(relative_error(y, wanted).cpu())

    @property
    def error(self) -> float:
        return mean_error(torch.cat(self._errors))

    @property
    def cosine(self) -> float:
        return torch.cat(self._cosines).mean().item()

    @property
    def value_error(self) -> float:
        return mean_error(torch.cat(self._values))


def _watched(
    context: AuditContext, mlp: MLP, generator: torch.Generator, found: Iterable[_Compared]
) -> Iterator[RemovableHandle]:
    """Hooks that compare within a pass that takes no gradients: these are on from the MLP's input to its output alone,
    so that no more than one MLP's activations are kept."""
    entered: list[tuple[Tensor, list[Tensor]]] = []

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        x = first_argument(args, kwargs).detach().requires_grad_()
        entered.append((x, [a for a in [*args, *kwargs.values()][1:] if isinstance(a, Tensor)]))
        torch.set_grad_enabled(True)
        if args:
            return (x, *args[1:]), kwargs
        return args, kwargs | {next(iter(kwargs)): x}

    def leave(_: Any, __: Any, y: Tensor) -> Tensor:
        x, routing = entered.pop()
        flat = x.detach().flatten(0, -2).requires_grad_()
        v = torch.randn(flat.shape, generator=generator)
        v = (v / v.norm(dim=1, keepdim=True)).to(flat)
        (theirs,) = torch.autograd.grad(y, x, v.view_as(y))
        there = (
            (x.detach() != 0).flatten(0, -2).any(1)
        )  # stacked experts get zeros for tokens that are others'
        for compared in found:
            out = compared.run(flat, routing)
            (ours,) = torch.autograd.grad(out, flat, v)
            parts = ours, theirs.view_as(ours), out.detach(), y.detach().view_as(ours)
            compared.add(*(part[there] for part in parts))
        torch.set_grad_enabled(False)
        return y.detach()

    yield context.original.get_submodule(mlp.module).register_forward_pre_hook(enter, with_kwargs=True)
    yield context.original.get_submodule(mlp.output).register_forward_hook(leave)


def model_gradients(context: AuditContext) -> Iterator[GradientError]:
    """The gradient of the loss in the locked model against that in the original, by the weights that both have.

    Args:
        context: The models and the text.

    Yields:
        A row for all of them, and one for each layer and for what is in none; tensors count by their size.
    """
    sequences, length = context.step_shape
    rows = context.neutral.heldout
    length = min(length, rows.shape[1])
    # pieces as long as a fine-tune's sequences, for the memory of its step
    ids = rows[:, : rows.shape[1] // length * length].reshape(-1, length)[: max(1, TOKENS // length)]
    theirs = dict(context.original.named_parameters())
    names = [
        name
        for name, weight in context.locked.named_parameters()
        if name in theirs and theirs[name].shape == weight.shape
    ]
    count = context.count("gradients of both models")
    both = []
    for number, model in enumerate((context.locked, context.original)):
        count(number, 2)
        both.append(_gradient(model, names, ids.split(sequences)))
    count(2, 2)
    groups: dict[str, list[tuple[Tensor, Tensor]]] = {WHOLE: []}
    for name, *pair in zip(names, *both, strict=True):
        groups[WHOLE].append((pair[0], pair[1]))
        groups.setdefault(_layer(name), []).append((pair[0], pair[1]))
    for name, pairs in groups.items():
        error, cosine = _compare(pairs)
        yield GradientError(name, error, cosine, ids.numel())


def _gradient(model: PreTrainedModel, names: list[str], batches: Iterable[Tensor]) -> list[Tensor]:
    """The gradient of the mean loss of batches [S, n] by the weights of these names."""
    with _only(model, names) as weights, backend("naive"):
        total = [torch.zeros_like(weight) for weight in weights]
        for ids in batches:
            loss = task_loss(model, ids.to(model.device)) * len(ids)
            found = torch.autograd.grad(loss, weights, allow_unused=True)
            for whole, part in zip(total, found, strict=True):
                if part is not None:
                    whole.add_(part)
    return total


@contextmanager
def _only(model: PreTrainedModel, names: list[str]) -> Iterator[list[Tensor]]:
    """The weights of these names, of which alone gradients are wanted within the block."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    weights = [model.get_parameter(name) for name in names]
    try:
        model.requires_grad_(False)
        yield [weight.requires_grad_() for weight in weights]
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def _compare(pairs: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """(relative error, cosine) of the gradients of several tensors as one vector each: (ours, theirs)."""

    def dot(a: Tensor, b: Tensor) -> float:
        return (a * b).sum(dtype=torch.float64).item()

    off = sum(dot(a - b, a - b) for a, b in pairs)
    ours = sum(dot(a, a) for a, _ in pairs)
    theirs = sum(dot(b, b) for _, b in pairs)
    along = sum(dot(a, b) for a, b in pairs)
    size = (ours * theirs) ** 0.5
    return off / theirs if theirs else float("inf"), along / size if size else 0.0


def _layer(name: str) -> str:
    try:
        return layer_of(name)
    except DLRError:
        return OUTSIDE


def gradient_section(report: AuditReport) -> Section:
    """How wrong the gradients through the chains are, and what that means."""

    def row(g: GradientError) -> tuple[str, ...]:
        return g.name, f"{g.error:.3f}", f"{g.cosine:.3f}", cell(g.value_error, ".3f")

    whole = next((g for g in report.gradients if g.name == WHOLE), None)
    modules = [g for g in report.gradients if g.value_error is not None]
    layers = [g for g in report.gradients if g.value_error is None and g is not whole]
    notes = [] if whole is None else [
        f"Training through the chains follows a gradient that is wrong by {whole.error:.0%} of the original's square, "
        f"with a cosine of {whole.cosine:.2f}: of a step's length, so much goes where the original's step would go."
    ]  # fmt: skip
    columns = "of | gradient's error | gradient's cosine | value's error"
    return Section(
        "Gradients through the chains",
        "On held-out neutral text. A module: random cotangents of unit size a token, taken back through the chain, or "
        "its student, and through the original's MLP at the same input. Weights: the gradient of the loss in the "
        "locked model and in the original, by the weights that both have. The original's own has an error of 0 and a "
        "cosine of 1, a gradient of zeros an error of 1, one that knows nothing a cosine of 0.",
        Table(
            headings(columns),
            [row(g) for g in (*([whole] if whole else []), *modules)],
            empty="Not measured.",
        ),
        notes,
        details=[Table(headings(columns), list(map(row, layers)), "Weights by layer")],
    )
