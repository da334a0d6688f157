"""Attacks on the chains' structure: they read the weights, change them, and train nothing.

Each is a function of one chain, DLRNet -> DLRNet in float32 on the chain's device, put in all the chains' places at
once; the original's MLPs put back are measured beside them. A new one is such a function and an entry of STRUCTURAL.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...convert.end_to_end import with_chains
from ...convert.evaluate import Evaluation, StateEvaluation
from ...convert.mlp_matching import MLP
from ...convert.redistill import flattened, merged
from ...runtime import DLRNet, DLRSpec
from ...triton_kernels import backend
from ..chains import chains_of, in_places
from ..context import AuditContext
from ..report import Structural, structural_from

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARE = 0.5  # of the singular values, that the attack on them keeps
# Steps that are merged. A lane in the place of an MLP of width 53,248 has at most 4,992 of them.
_GROUPS = [2**n for n in range(1, 13)]


@dataclass(frozen=True, slots=True)
class StructuralAttack:
    """A change of a chain's weights.

    Attributes:
        name, about, slots: As in `report.Structural`.
        change: What it makes of a chain: a new one, in float32 on the chain's device. The chain stays as it is.
        least_depth: How many steps the deepest chain of a model must have for the attack to make sense.
    """

    name: str
    about: str
    slots: str
    change: Callable[[DLRNet], DLRNet]
    least_depth: int = 1


def structural_attacks(depth: int) -> list[StructuralAttack]:
    """The attacks on chains of at most `depth` steps."""
    return [attack for attack in STRUCTURAL if depth >= attack.least_depth]


def structural_rows(context: AuditContext) -> Iterator[Structural]:
    """Every attack on the chains, and 'swap', each measured against the original on the neutral held-out text.

    Raises:
        DLRError: As `compare` does.
    """
    chains = {chain: chain.net(context.locked) for chain in chains_of(context.mlps, context.locked)}

    def row(attack: StructuralAttack) -> Structural:
        changed = in_places(context.locked, {chain: attack.change(net) for chain, net in chains.items()})
        evaluation = evaluated(context, with_chains(context.locked, changed, []), attack.name)
        return Structural(attack.name, attack.about, evaluation, attack.slots)

    def swap() -> Structural:
        evaluation = evaluated(context, swapped(context.locked, context.original, context.mlps), "swap")
        return Structural("swap", "the original's MLPs are put back: it must be public", evaluation, "MLP")

    for attack in structural_attacks(max(net.spec.depth for net in chains.values())):
        yield kept_row(context, attack.name, partial(row, attack))
    yield kept_row(context, "swap", swap)


def kept_row(context: AuditContext, name: str, make: Callable[[], Structural]) -> Structural:
    """The row that `make` gives, or gave before an interruption."""
    return structural_from(context.part(f"structural {name}", lambda: asdict(make())))


def evaluated(context: AuditContext, attacked: PreTrainedModel, name: str) -> Evaluation | StateEvaluation:
    """How far an attacked model is from the original, on the neutral held-out text.

    The chains run by their definition: the kernels' Gram blocks of one step, as wide as an MLP, would be gigabytes of
    zeros.
    """
    with backend("naive"):
        return context.reference.compare(attacked, context.count(f"evaluating {name}"))


def dropped(net: DLRNet) -> DLRNet:
    """The first step and every 2nd after it. B grows by K over the steps kept, 2 for an even K, so that a lane's
    updates stay as large."""
    kept = -(-net.spec.depth // 2)
    half = _rewritten(net, replace(net.spec, depth=kept), lambda weight: weight[:, ::2])
    half.dlr_B.mul_(net.spec.depth / kept)
    return half


def truncated(net: DLRNet, share: float) -> DLRNet:
    """The flattened chain whose A and B keep this share of their min(R, d) singular values, the largest ones."""
    flat = flattened(net)
    return _rewritten(flat, flat.spec, lambda weight: _truncated(weight[0, 0], share)[None, None])


def _truncated(W: Tensor, share: float) -> Tensor:
    """W [R, d] projected on its largest right singular vectors, from the Gram matrix: d is the short side of a wide
    step."""
    count = max(1, round(share * min(W.shape)))
    gram = W.double().T @ W.double()
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -count:]  # in ascending order of singular values
    return (W.double() @ vectors @ vectors.T).to(W.dtype)


@torch.no_grad()
def _rewritten(net: DLRNet, spec: DLRSpec, change: Callable[[Tensor], Tensor]) -> DLRNet:
    """A chain of `spec` whose A and B are `change` of those of `net`, in float32; scale and bias are its own."""
    changed = DLRNet(spec, dtype=torch.float32, device=net.dlr_A.device)
    weights = {name: change(getattr(net, name).detach().float()) for name in net.weight_names(net.spec)}
    changed.assign(weights | {"dlr_scale": net.dlr_scale, "dlr_bias": net.dlr_bias})
    return changed


def swapped(locked: PreTrainedModel, original: PreTrainedModel, mlps: Sequence[MLP]) -> PreTrainedModel:
    """`locked` with the MLPs of `original`, which is of the same dtype, in the chains' places; the rest is its own."""
    attacked = with_chains(locked, {}, [])
    for name in (part for mlp in mlps for part in (mlp.module, *mlp.identity)):
        parent, _, child = name.rpartition(".")
        owner, part = attacked.get_submodule(parent), getattr(original.get_submodule(parent), child)
        if isinstance(part, nn.Module) and original.device != locked.device:
            part = copy.deepcopy(part).to(locked.device)
        delattr(owner, child)  # an activation may be a plain function, which cannot be set over a module
        setattr(owner, child, part)
    return attacked


STRUCTURAL: list[StructuralAttack] = [
    StructuralAttack("flatten", "every step reads x: one wide step, an MLP", "MLP", flattened),
    *(
        StructuralAttack(
            f"merge {group}",
            f"{group} steps of a lane at a time read the same state",
            "chain",
            partial(merged, group=group),
            least_depth=group + 1,
        )
        for group in _GROUPS
    ),
    StructuralAttack(
        "drop every 2nd",
        "every 2nd step is left out, the others write twice as much",
        "chain",
        dropped,
        least_depth=2,
    ),
    StructuralAttack(
        "svd 1/2",
        "flattened, with half of the singular values of its matrices",
        "MLP",
        partial(truncated, share=_SHARE),
    ),
]
