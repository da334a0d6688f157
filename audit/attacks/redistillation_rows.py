"""What redistillation costs and leaves: rows of the report, made of the students of `redistillation.py`."""

from __future__ import annotations

from collections.abc import Sequence

from ...convert.end_to_end import with_chains
from ...convert.experts.routing import Mixture
from ...convert.outlook.steps import step_of
from ...convert.redistill import BATCH, FIT_TOKENS, half_of, regression_flops, student_recipe
from ...reporting.lock_verdict import UNDONE_RATIO
from ...runtime import DLRNet, DLRSpec
from ..chains import chains_of, in_places
from ..context import AuditContext
from ..report import Structural
from .redistillation import Students
from .structural import evaluated


def redistillation_flops(
    net: DLRNet,
    chain: DLRSpec,
    train_tokens: int,
    init: str,
    *,
    model_params: int,
    tokens: int,
    part: float = 1.0,
) -> int:
    """FLOPs of making one student of one chain.

    They are those of the fit's steps, of the forward pass that gives x and y, and of the least
    squares of the initialisation where that is 'linear'.

    Args:
        net: The student.
        chain: The chain.
        train_tokens: Training tokens of the fit.
        init: What the student started from.
        model_params: Of the model's body that a token passes, without embeddings, which are looked up, over its chains.
        tokens: Of the attacker's text; fewer are run where the training tokens are fewer.
        part: Of all these tokens, those that the chain gets, see `Chain`.
    """
    used = min(train_tokens, tokens)
    fitted, seen = (max(1, round(part * count)) for count in (train_tokens, used))
    batch = min(BATCH, fitted)
    fit = -(-fitted // batch) * step_of(net.spec, student_recipe(batch, init), parts=1).flops
    forward = 2 * model_params * used
    return fit + forward + (regression_flops(chain, seen, half_of(chain)) if init == "linear" else 0)


def redistillation_row(
    context: AuditContext, modules: Sequence[Students], name: str, train_tokens: int
) -> Structural:
    """The best students in the chains' places, against the original on the neutral held-out text.

    Args:
        context: The models and the text.
        modules: What `redistilled_modules` yielded.
        name: The row's.
        train_tokens: Training tokens of the students that are taken.

    Returns:
        The row; its FLOPs and seconds are those of the best students alone.
    """
    nets = {context.chains[figures.module]: made[train_tokens] for figures, made in modules}
    best = {
        chain: min(
            (c for c in figures.students if c.train_tokens == chain.tokens(train_tokens)),
            key=lambda c: c.distance,
        )
        for chain, (figures, _) in zip(nets, modules, strict=True)
    }
    flops = sum(
        redistillation_flops(
            net,
            chain.net(context.locked).spec,
            train_tokens,
            best[chain].init,
            model_params=_passed(context) // len(nets),
            tokens=context.neutral.train.numel(),
            part=chain.part,
        )
        for chain, net in nets.items()
    )
    if len(nets) < len(chains_of(context.mlps, context.locked)):
        slots = "chain"  # of some experts, see `fullest`: no way around the lock
    else:
        slots = "MLP" if all(net.spec.depth == 1 for net in nets.values()) else "two steps"
    return Structural(
        name,
        "every chain is distilled back, on its own outputs, into an MLP of its size or two wide steps",
        evaluated(context, with_chains(context.locked, in_places(context.locked, nets), []), name),
        slots,
        train_tokens,
        flops,
        sum(student.seconds for student in best.values()),
    )


def merged_row(context: AuditContext, modules: Sequence[Students], name: str) -> Structural:
    """Every chain as the fewest wide steps that regression alone makes as good as it, against the original.

    Args:
        context: The models and the text.
        modules: What `redistilled_modules` yielded.
        name: The row's.

    Returns:
        The row; its FLOPs are those of the passes that give x and of every regression that was tried.
    """
    tokens = min(context.neutral.train.numel(), FIT_TOKENS)
    flops = 2 * _passed(context) * tokens
    nets = {context.chains[figures.module]: made[0] for figures, made in modules}
    for chain, (figures, _) in zip(nets, modules, strict=True):
        spec, seen = chain.net(context.locked).spec, chain.tokens(tokens)
        flops += sum(regression_flops(spec, seen, -(-spec.depth // m.steps)) for m in figures.merges)
    return Structural(
        name,
        f"every chain is merged into as few wide steps as leave at most {UNDONE_RATIO} times its error, their reading "
        "directions found by linear regression; nothing is trained",
        evaluated(context, with_chains(context.locked, in_places(context.locked, nets), []), name),
        "chain",
        flops=flops,
    )


def _passed(context: AuditContext) -> int:
    """Parameters of the locked model's body that a token passes: of a locked mixture those of its own experts."""
    params = context.locked.base_model.num_parameters(exclude_embeddings=True)
    for mlp in context.mlps:
        if isinstance(mlp, Mixture):
            own = sum(p.numel() for p in context.locked.get_submodule(mlp.module).parameters())
            params -= round(own * (1 - mlp.chosen / mlp.experts))
    return params
