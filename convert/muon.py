"""Muon for stacks of matrices: torch.optim.Muon takes one matrix at a time, a chain has 2K of them.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024): the momentum of a matrix is
replaced by the nearest semi-orthogonal matrix, so that every direction moves equally fast.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .parallel.ranks import ALONE, Ranks

# Four rounds of Polar Express (Amsel et al., arXiv 2505.16932) for singular values of 1e-3 to 1; all but the last
# carry its safety factor of 1.01. As exact as Jordan's five rounds (0.5% less error) and one round cheaper.
_SAFETY = 1.01
_ROUNDS = (
    (8.2872120 / _SAFETY, -23.5958865 / _SAFETY**3, 17.3003874 / _SAFETY**5),
    (4.1070591 / _SAFETY, -2.9478499 / _SAFETY**3, 0.5448431 / _SAFETY**5),
    (3.9486909 / _SAFETY, -2.9089021 / _SAFETY**3, 0.5518191 / _SAFETY**5),
    (3.3184197, -2.4884880, 0.5100489),
)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised matrix by matrix; parameters are [..., r, d] with r <= d or not.

    Args:
        groups: Parameter groups as torch's optimizers take them. Besides `lr` a group may carry a `preconditioner`,
            see `orthogonalised`; `rows`: a matrix of more rows is cut into equal blocks of at most so many, each
            orthogonalised by itself, for the iteration's FLOPs grow with the cube of a block's rows; and
            `weight_decay`, which shrinks a parameter by lr * weight_decay a step.
        momentum: From 0 to 1.
        ranks: Who takes the same steps, with the same gradients; each orthogonalises its part of the blocks.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float = 0.95, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        super().__init__(
            groups, {"momentum": momentum, "preconditioner": None, "rows": None, "weight_decay": 0.0}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = torch.lerp(parameter.grad, momentum, group["momentum"])
                blocks = _blocks(direction, group["rows"])
                of = partial(orthogonalised, preconditioner=group["preconditioner"])
                update = self._ranks.spread(of, blocks).view_as(parameter)
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update, alpha=group["lr"])


def orthogonalised(matrices: Tensor, preconditioner: Tensor | None = None) -> Tensor:
    """orth(M P) P for each matrix M; singular values of orth() are about 1.

    The iteration X <- aX + b(XX^T)X + c(XX^T)^2 X keeps X's right factor, so it runs on the Gram matrix of the short
    side: on [r, d] a third of the FLOPs of the plain form, on [1536, 576] a twelfth.

    Args:
        matrices: [..., r, d].
        preconditioner: P^2 [d, d] for a symmetric P, None for P = 1; with one, r <= d. The product with it is made in
            its dtype, all others in the matrices'.

    Returns:
        [..., r, d].
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalised(matrices.mT).mT
    right = matrices
    if preconditioner is not None:
        right = (matrices.to(preconditioner.dtype) @ preconditioner).to(matrices.dtype)
    gram = right @ matrices.mT  # M P (M P)^T
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] * _SAFETY**2 + 1e-20
    gram = gram / size
    left = factor = _factor(gram, *_ROUNDS[0])
    for coefficients in _ROUNDS[1:]:
        gram = factor @ gram @ factor
        factor = _factor(gram, *coefficients)
        left = factor @ left
    return (left / size.sqrt()) @ right


def orthogonalising_flops(rows: int, columns: int) -> int:
    """FLOPs of `orthogonalised` for one matrix without a preconditioner: two products with the long side, and on the
    short side's Gram matrix one in the first round and four in each of the others."""
    short, long = sorted((rows, columns))
    return 2 * short * short * (2 * long + (4 * len(_ROUNDS) - 3) * short)


def _factor(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    factor = b * gram + c * (gram @ gram)
    factor.diagonal(dim1=-2, dim2=-1).add_(a)
    return factor


def _blocks(matrices: Tensor, rows: int | None) -> Tensor:
    """[..., r, d] -> [..., r / b, b, d] with the largest b that divides r and is at most `rows`."""
    r = matrices.shape[-2]
    if rows is None or r <= rows:
        return matrices
    return matrices.unflatten(-2, (-1, max(b for b in range(1, rows + 1) if r % b == 0)))
