"""What it costs to undo a chain: the strongest attack known to us, run on each module as it is made.

Flattened, a chain is an MLP of its own size: one step of rank L K r. The attacker distils the chain back into
that, on text, from a start that the chain gives away: each step's reading directions, brought back to x. With
u_k the state's movement before step k, z_k = x + u_k and u_k is nearly x J_k for the best linear J_k, so a unit
that reads z_k A reads about x (1 + J_k) A.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime import DLRNet, DLRSpec
from ..triton_kernels.reference import add_product, step_hidden
from .capture import Activations, random_rows
from .distill import distill
from .fidelity import measure
from .recipe import Recipe

# A copy is as good as the chain when its error against the MLP is at most so many times the chain's.
UNDONE = 1.05
_FIT_TOKENS = 40_000  # tokens for the linear maps J_k
_RATE = 0.012
_BATCH = 256  # smaller ones undo more: 128 undid a small chain at 0.05 of its visits that 512 did not


@dataclass(frozen=True, slots=True)
class Unlocking:
    """Undoing one module. visits: token visits the attacker spent; conversion: those that the chain cost.

    error: the copy's error against the original MLP, chain_error: the chain's own, both on held-out tokens as in
    `Fidelity`; copy_error: the copy's error against the chain.
    """

    visits: int
    conversion: int
    error: float
    chain_error: float
    copy_error: float

    @property
    def undone(self) -> bool:
        """Whether the copy is as good as the chain."""
        return self.error <= UNDONE * self.chain_error

    @property
    def cost(self) -> float:
        """The attacker's visits as a share of the conversion's."""
        return self.visits / self.conversion

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "undone": self.undone, "cost": self.cost}


def undo(
    net: DLRNet,
    activations: Activations,
    tokens: int,
    chain_error: float,
    *,
    visits: int,
    conversion: int,
    name: str,
    device: torch.device,
    start: str = "linear",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Unlocking:
    """Distils `net` back into an MLP of its size, for `visits` token visits, and measures the copy.

    The first `tokens` rows of `activations` are the attacker's text, the rest is held out. start: 'linear' as
    above, 'flat' with J = 0, or 'random'.
    """
    flat, tensors = flattened(net, activations, tokens, device, linear=start == "linear", seed=seed)
    net = net.to(device)
    copied = Activations(
        activations.x, _outputs(net, activations.x, device), activations.first, activations.mapped
    )
    recipe = Recipe(visits=visits, batch=min(_BATCH, visits), seed=seed, rate=_RATE)
    weights = distill(
        copied,
        tokens,
        flat,
        recipe,
        name=f"the copy of {name}",
        device=device,
        start=None if start == "random" else tensors,
        progress=progress,
    )
    copy = DLRNet(flat, dtype=torch.float32)
    copy.assign(weights)
    held = torch.arange(tokens, len(activations))
    x, y = activations.rows(held)
    return Unlocking(
        visits,
        conversion,
        measure(copy, x, y, device).rel_error,
        chain_error,
        measure(copy, *copied.rows(held), device).rel_error,
    )


@torch.no_grad()
def flattened(
    net: DLRNet,
    activations: Activations,
    tokens: int,
    device: torch.device,
    *,
    linear: bool,
    seed: int = 0,
) -> tuple[DLRSpec, dict[str, Tensor]]:
    """The MLP that a chain is when every step reads x: one step of rank L K r, and its tensors in float32.

    linear: each step reads x (1 + J_k) instead, J_k [d, d] the least-squares map of x to the step's u_k.
    """
    spec = net.spec
    shape = (1, 1, spec.lanes * spec.depth * spec.rank, spec.hidden_size)
    flat = DLRSpec(spec.hidden_size, 1, 1, shape[2], spec.act, spec.gated)
    weights = {name: getattr(net, name).detach().to(device, torch.float32) for name in net.weight_names(spec)}
    if linear:
        x = activations.rows(random_rows(tokens, _FIT_TOKENS, seed))[0].to(device, torch.float32)
        weights |= _linear_reads(weights, x, spec)
    tensors = {name: w.reshape(shape).cpu() for name, w in weights.items()}
    return flat, tensors | {
        name: getattr(net, name).detach().float().cpu() for name in ("dlr_scale", "dlr_bias")
    }


def _linear_reads(weights: dict[str, Tensor], x: Tensor, spec: DLRSpec) -> dict[str, Tensor]:
    """A and G of every step, read from x: A (1 + J_k)^T."""
    rms = x.square().mean(1, keepdim=True).sqrt()
    weight = 1 / rms.clamp(min=1e-6 * rms.mean())  # every token counts alike, whatever its size
    wx = x * weight
    covariance = (wx.T @ wx).double()
    covariance.diagonal().add_(1e-4 * covariance.diagonal().mean())
    solve = torch.linalg.inv(covariance).float() @ wx.T  # [d, N]
    reads = {name: torch.empty_like(w) for name, w in weights.items() if name != "dlr_B"}
    for lane in range(spec.lanes):
        z = x[None]
        for k in range(spec.depth):
            jacobian = solve @ ((z[0] - x) * weight)  # u = x J
            step = {name: w[lane : lane + 1, k] for name, w in weights.items()}
            for name in reads:
                reads[name][lane, k] = step[name][0] + step[name][0] @ jacobian.T
            z = add_product(z, step_hidden(z, step["dlr_A"], step.get("dlr_G"), spec.act), step["dlr_B"])
    return reads


@torch.no_grad()
def _outputs(net: DLRNet, x: Tensor, device: torch.device) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    for at in range(0, len(x), 8192):
        y[at : at + 8192] = net(x[at : at + 8192].to(device).float()).to(x.dtype)
    return y
