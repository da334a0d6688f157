"""The studies of single modules of `fidelity`: what their chains' fits end at, and what moves that."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dlr_lock import DLRNet
from dlr_lock.audit.attacks.redistillation import merge_steps
from dlr_lock.common.dtypes import dtype_name, products_in
from dlr_lock.common.splits import random_rows
from dlr_lock.convert.activations.pairs import Activations
from dlr_lock.convert.config import Recipe
from dlr_lock.convert.context import Context
from dlr_lock.convert.evaluate import Fidelity
from dlr_lock.convert.mlp_matching import MLP
from dlr_lock.convert.outlook.phases import module_flops
from dlr_lock.convert.pipeline import fit_chain
from dlr_lock.convert.redistill import FIT_TOKENS, INITS, redistill
from dlr_lock.microbench.bench import numbers
from dlr_lock.reporting.lock_verdict import Redistillation, undoing_figures

from .fidelity_model import Job
from .gpu.rows import ProductsRow
from .whole_model import study

# What can be varied.
OF_RECIPE = ("rate", "momentum", "scale", "preconditioner_exponent", "lr_multiplier_b", "weight_decay")
_PRODUCTS = (torch.float32, torch.bfloat16)  # the first is what the other is held against


@dataclass(frozen=True, slots=True)
class Fit:
    """A module's chain, and what it took.

    Attributes:
        net: The chain, in float32.
        fidelity: On held-out tokens.
        seconds: Without those of the looks at it.
        curve: `Fidelity` at up to 32 looks, with the training tokens and the seconds until then.
    """

    net: DLRNet
    fidelity: Fidelity
    seconds: float
    curve: list[dict[str, Any]]


def modules(job: Job) -> Iterator[dict[str, Any]]:
    """Rows of layers x training tokens: `Fidelity`, the curve while it was fitted, and the attack at each share."""
    for context, mlp, pairs, recipe in _to_fit(job):
        fit = _fit(context, mlp, pairs, recipe, "")
        yield {
            "layer": mlp.layer,
            "chain": str(fit.net.spec),
            **asdict(recipe),
            **fit.fidelity.to_dict(),
            "seconds": fit.seconds,
            "flops": _flops(context, mlp, recipe),
            "tokens": context.train_rows,
            "curve": fit.curve,
            **_attacked(context, mlp, pairs, recipe, fit, job.shares),
        }


def products(job: Job) -> Iterator[dict[str, Any]]:
    """`ProductsRow`s of layers x training tokens x dtypes: of one text, the same activations, batches and start."""
    for context, mlp, pairs, recipe in _to_fit(job):
        exact: float | None = None
        for dtype in _PRODUCTS:
            name = dtype_name(dtype)
            with products_in(dtype):
                fit = _fit(context, mlp, pairs, recipe, f", products in {name}")
            exact = exact or fit.fidelity.rel_error
            row = ProductsRow(
                layer=mlp.layer,
                chain=str(fit.net.spec),
                products=name,
                tokens=context.train_rows,
                train_tokens=recipe.train_tokens,
                rel_error=fit.fidelity.rel_error,
                flatten_gap=fit.fidelity.flatten_gap,
                seconds=fit.seconds,
                flops=_flops(context, mlp, recipe),
                error_ratio=fit.fidelity.rel_error / exact,
                curve=fit.curve,
            )
            yield asdict(row)


def _to_fit(job: Job) -> Iterator[tuple[Context, MLP, Activations, Recipe]]:
    """The modules and, of each, the recipes of all training tokens that are asked for."""
    given = {name: value for name in OF_RECIPE if (value := getattr(job.options, name)) is not None}
    lengths = [replace(job.config, train_tokens=count) for count in numbers(job.options.train_tokens)]
    with study(job.options.model, job.config, job.progress) as context:
        for mlp, pairs in context.capture(context.mlps):
            for length in lengths:
                recipe = replace(length.recipe(gated=mlp.gated), **given)
                yield context, mlp, pairs, replace(recipe, seed=recipe.seed + mlp.layer)


def _fit(context: Context, mlp: MLP, pairs: Activations, recipe: Recipe, how: str) -> Fit:
    """how: What tells the fit from others of the module, behind its training tokens."""
    seen = DLRNet(context.config.spec_for(mlp.hidden_size, mlp.params), dtype=torch.float32)
    curve: list[dict[str, Any]] = []
    watching = 0.0
    started = time.monotonic()

    def watch(train_tokens: int, tensors: dict[str, Tensor]) -> None:
        nonlocal watching
        began = time.monotonic()
        seen.assign(tensors)
        now = context.fidelity(seen, pairs).to_dict()
        curve.append({"train_tokens": train_tokens, "seconds": began - started - watching, **now})
        watching += time.monotonic() - began

    title = f"layer {mlp.layer}, {recipe.train_tokens:,} training tokens{how}"
    net = fit_chain(context, mlp, pairs, recipe, title, watch=watch)
    seconds = time.monotonic() - started - watching
    return Fit(net, context.fidelity(net, pairs), seconds, curve)


def _flops(context: Context, mlp: MLP, recipe: Recipe) -> float:
    """Of a fit, as `dlr-lock plan` reckons them."""
    assert context.amounts is not None
    own = [replace(chains, recipe=recipe) for chains in context.amounts.chains]
    return module_flops(replace(context.amounts, chains=own), mlp.module)


def _attacked(
    context: Context, mlp: MLP, pairs: Activations, recipe: Recipe, fit: Fit, shares: list[float]
) -> dict[str, Any]:
    """The attack on a chain at each share of its training tokens, its steps merged, and what undoing it takes."""
    attacks: list[Redistillation] = []
    for share in shares:
        for init in INITS:
            attack = redistill(
                fit.net,
                pairs,
                context.train_rows,
                train_tokens=max(1, round(share * recipe.train_tokens)),
                conversion=recipe.train_tokens,
                name=mlp.module,
                device=context.device,
                inits=[init],
                progress=context.count(f"redistilling layer {mlp.layer} at {share:g}, {init} initialisation"),
            )
            attacks.append(attack)
    sample = pairs.rows(random_rows(context.train_rows, FIT_TOKENS, recipe.seed))[0]
    merges, _ = merge_steps(
        fit.net,
        sample.float(),
        lambda shorter: context.fidelity(shorter, pairs).rel_error,
        fit.fidelity.rel_error,
    )
    made = [attempt for attack in attacks for attempt in attack.attempts]
    undoing = undoing_figures(made, recipe.train_tokens)
    return {
        "attacks": [attack.to_dict() for attack in attacks],
        "merges": [asdict(merge) for merge in merges],
        **{name: figure.to_dict() for name, figure in undoing.items()},
    }
