"""Attacks on the chains' structure: they read the weights, change them, and train nothing.

Each is a function of one chain, DLRNet -> DLRNet in float32 on the chain's device, put in all the chains' places at
once; the original's MLPs put back are measured beside them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..common.progress import Progress
from ..convert.end_to_end import with_chains
from ..convert.evaluate import Evaluation, StateEvaluation, compare
from ..convert.mlp_matching import MLP
from ..convert.redistill import flattened
from ..runtime import DLRNet, DLRSpec
from ..triton_kernels import backend
from .report import Structural

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Keeping = Callable[[str, Callable[[], Structural]], Structural]
_SHARE = 0.5  # of the singular values, that the attack on them keeps


@dataclass(frozen=True, slots=True)
class Attack:
    """name, about, slots: as in `Structural`; change: what it makes of a chain."""

    name: str
    about: str
    slots: str
    change: Callable[[DLRNet], DLRNet]


def attacks(depth: int) -> list[Attack]:
    """The attacks on chains of at most `depth` steps; merges of 2, 4, 8 and so on of them."""
    found = [Attack("flatten", "every step reads x: one wide step, an MLP", "MLP", flattened)]
    group = 2
    while group < depth:
        about = f"{group} steps of a lane at a time read the same state"
        found.append(Attack(f"merge {group}", about, "chain", partial(merged, group=group)))
        group *= 2
    if depth > 1:
        about = "every 2nd step is left out, the others write twice as much"
        found.append(Attack("drop every 2nd", about, "chain", dropped))
    about = "flattened, with half of the singular values of its matrices"
    return [*found, Attack("svd 1/2", about, "MLP", partial(truncated, share=_SHARE))]


def structural_rows(
    locked: PreTrainedModel,
    original: PreTrainedModel,
    mlps: Sequence[MLP],
    heldout: Tensor,
    progress: Progress = lambda what, done, total: None,
    kept: Keeping = lambda name, make: make(),
) -> Iterator[Structural]:
    """Every attack on the chains of `locked`, and 'swap', each measured against `original` on heldout [H, n].

    mlps: the original's MLPs that are locked. kept: gives a row that was made before, or what `make` gives. Neither
    model is changed. Raises DLRError as `compare` does.
    """
    chains = {mlp.module: locked.get_submodule(mlp.module) for mlp in mlps}

    def row(attack: Attack) -> Structural:
        attacked = with_chains(locked, {name: attack.change(chain) for name, chain in chains.items()}, [])
        evaluation = evaluated(attacked, original, heldout, attack.name, progress)
        return Structural(attack.name, attack.about, evaluation, attack.slots)

    def swap() -> Structural:
        evaluation = evaluated(swapped(locked, original, mlps), original, heldout, "swap", progress)
        return Structural("swap", "the original's MLPs are put back: it must be public", evaluation, "MLP")

    for attack in attacks(max(chain.spec.depth for chain in chains.values())):
        yield kept(attack.name, partial(row, attack))
    yield kept("swap", swap)


def evaluated(
    attacked: PreTrainedModel, original: PreTrainedModel, heldout: Tensor, name: str, progress: Progress
) -> Evaluation | StateEvaluation:
    """`compare` for a model with attacked chains, by the definition of a chain: the kernels' Gram blocks of one
    step, as wide as an MLP, would be gigabytes of zeros."""
    with backend("naive"):
        return compare(attacked, original, heldout, partial(progress, f"evaluating {name}"))


def merged(net: DLRNet, group: int) -> DLRNet:
    """`group` consecutive steps of a lane read the state that the first of them reads: L x ceil(K / group) x group r.

    A last group with fewer steps is filled up with units of zero weights, which add nothing.
    """
    lanes, depth, rank, hidden = net.spec.weight_shape
    group = min(group, depth)
    steps = -(-depth // group)

    def wide(weight: Tensor) -> Tensor:
        filled = weight.new_zeros(lanes, steps * group, rank, hidden)
        filled[:, :depth] = weight
        return filled.view(lanes, steps, group * rank, hidden)

    return _rewritten(net, replace(net.spec, depth=steps, rank=group * rank), wide)


def dropped(net: DLRNet) -> DLRNet:
    """The first step and every 2nd after it. B grows by K over the steps kept, 2 for an even K, so that a lane's
    updates stay as large."""
    kept = -(-net.spec.depth // 2)
    half = _rewritten(net, replace(net.spec, depth=kept), lambda weight: weight[:, ::2])
    half.dlr_B.mul_(net.spec.depth / kept)
    return half


def truncated(net: DLRNet, share: float) -> DLRNet:
    """The flattened chain whose A, B and, for gated steps, G keep this share of their min(R, d) singular values, the
    largest ones."""
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
    """A chain of `spec` whose A, B and G are `change` of those of `net`, in float32; scale and bias are its own."""
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
