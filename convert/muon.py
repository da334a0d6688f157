"""Muon for stacks of matrices: torch.optim.Muon takes one matrix at a time, a chain has 2K of them.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024): the momentum of a matrix is
replaced by the nearest semi-orthogonal matrix, so that every direction moves equally fast.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: five rounds bring singular values to 0.7..1.2
_ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised matrix by matrix; parameters are [..., r, d] with r <= d or not."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                direction = torch.lerp(parameter.grad, momentum, group["momentum"])
                parameter.sub_(orthogonalised(direction), alpha=group["lr"])


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix of each, roughly: [..., r, d] -> [..., r, d], singular values near 1.

    The Newton-Schulz iteration X <- aX + b(XX^T)X + c(XX^T)^2 X, run on the Gram matrix of the short side:
    X keeps its right factor, so only [r, r] products are repeated (on [1536, 576] that is 12 times cheaper).
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalised(matrices.mT).mT
    a, b, c = _QUINTIC
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    gram = x @ x.mT
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    left = eye
    for _ in range(_ROUNDS):
        factor = a * eye + b * gram + c * (gram @ gram)
        left = factor @ left
        gram = factor @ gram @ factor
    return left @ x
