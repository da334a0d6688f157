"""What it costs to undo a chain: the strongest attack known to us, run on each module as it is made.

The attacker distils the chain back into an MLP of its size, on text, from one of three starts:

    flat     the chain flattened, one step of rank L K r: every step reads x
    linear   the same with each step's reading directions brought back to x. With u_k the state's movement before
             step k, z_k = x + u_k and u_k is nearly x J_k for the best linear J_k, so a unit that reads z_k A reads
             about x (1 + J_k) A
    random   a fresh SwiGLU MLP with as many parameters, which takes nothing from the chain but its outputs
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime import DLRError, DLRNet, DLRSpec
from ..triton_kernels import chain_reference
from ..triton_kernels.reference import add_product, step_hidden
from .capture import Activations, random_rows
from .distill import distill
from .fidelity import in_float32, measure
from .recipe import Recipe

STARTS = ("linear", "flat", "random")
# A copy is as good as the chain when its error against the MLP is at most so many times the chain's.
UNDONE = 1.05
FIT_TOKENS = 40_000  # tokens for the linear maps J_k
_RATE = 0.012
_ROWS = 8192  # tokens at a time, where the chain is run
BATCH = 256  # smaller ones undo more: 128 undid a small chain at 0.05 of its visits that 512 did not


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

    activations: x and y = mlp(x), of the original MLP; arguments else, and errors, as `fit_copy`.
    """
    own = Activations(
        activations.x, _outputs(net, activations.x, device), activations.first, activations.mapped
    )
    copy = fit_copy(
        net,
        own,
        tokens,
        visits=visits,
        start=start,
        seed=seed,
        name=name,
        device=device,
        progress=progress,
    )
    held = torch.arange(tokens, len(activations))
    error, copy_error = (measure(copy, *pairs.rows(held), device).rel_error for pairs in (activations, own))
    return Unlocking(visits, conversion, error, chain_error, copy_error)


def fit_copy(
    net: DLRNet,
    activations: Activations,
    tokens: int,
    *,
    visits: int,
    start: str,
    seed: int,
    name: str,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], object] = lambda sentence: None,
) -> DLRNet:
    """An MLP of the size of `net`, one step wide, distilled from it for `visits` token visits: float32, on the CPU.

    activations: x and y = net(x); the first `tokens` rows are the attacker's text. start: see above. name: the
    module's, for errors. progress and note as in `distill`. `net` is left as it is. Raises DLRError on another
    start, and as `distill` does.
    """
    if start not in STARTS:
        raise DLRError(f"unknown start {start!r}; one of {', '.join(STARTS)}")
    given = None
    if start == "random":
        spec = DLRSpec.of_params(net.spec.hidden_size, net.spec.params, depth=1, act="silu", gated=True)
    else:
        reads = None
        if start == "linear":
            x = activations.rows(random_rows(tokens, FIT_TOKENS, seed))[0]
            reads = linear_reads(net, x.to(device, torch.float32))
        flat = flattened(net, reads)
        spec, given = flat.spec, flat.state_dict()
    batch = min(BATCH, visits)
    recipe = Recipe(visits, batch, "random", seed, rate=_RATE, writing=1.0, weight_decay=0.0)
    tensors = distill(
        activations,
        tokens,
        spec,
        recipe,
        name=f"the copy of {name}",
        device=device,
        start=given,
        progress=progress,
        note=note,
    )
    copy = DLRNet(spec, dtype=torch.float32)
    copy.assign(tensors)
    return copy


def flattened(net: DLRNet, reads: dict[str, Tensor] | None = None) -> DLRNet:
    """The MLP that a chain is when every step reads x: one step of rank L K r, in float32, on the chain's device.

    reads: what its steps read x with instead of their A (and G), [L, K, r, d] each, as `linear_reads` gives them.
    """
    spec = net.spec
    flat = DLRNet(
        DLRSpec(spec.hidden_size, 1, 1, spec.lanes * spec.depth * spec.rank, spec.act, spec.gated),
        dtype=torch.float32,
        device=net.dlr_A.device,
    )
    tensors = dict(net.named_parameters()) | (reads or {})
    flat.assign({name: tensors[name].reshape(p.shape) for name, p in flat.named_parameters()})
    return flat


@torch.no_grad()
def linear_reads(net: DLRNet, x: Tensor) -> dict[str, Tensor]:
    """A and G of every step, brought back to x: A (1 + J_k)^T with J_k [d, d] the least-squares map of x to u_k.

    x: [N, d] float32, tokens to fit J_k on. Returns [L, K, r, d] each, in float32 on x's device.
    """
    A, B, _, _, G, act = in_float32(net, x.device)
    rms = x.square().mean(1, keepdim=True).sqrt()
    weight = 1 / rms.clamp(min=1e-6 * rms.mean())  # every token counts alike, whatever its size
    wx = x * weight
    covariance = (wx.T @ wx).double()
    covariance.diagonal().add_(1e-4 * covariance.diagonal().mean())
    solve = torch.linalg.inv(covariance).float() @ wx.T  # [d, N]
    readers = {"dlr_A": A} if G is None else {"dlr_A": A, "dlr_G": G}
    reads = {name: torch.empty_like(w) for name, w in readers.items()}
    for lane in range(net.spec.lanes):
        z = x[None]
        for k in range(net.spec.depth):
            jacobian = solve @ ((z[0] - x) * weight)  # u = x J
            for name, w in readers.items():
                reads[name][lane, k] = w[lane, k] + w[lane, k] @ jacobian.T
            one = slice(lane, lane + 1)
            z = add_product(z, step_hidden(z, A[one, k], None if G is None else G[one, k], act), B[one, k])
    return reads


@torch.no_grad()
def _outputs(net: DLRNet, x: Tensor, device: torch.device) -> Tensor:
    weights, y = in_float32(net, device), torch.empty(x.shape, dtype=x.dtype)
    for at in range(0, len(x), _ROWS):
        rows = slice(at, at + _ROWS)
        y[rows] = chain_reference(x[rows].to(device, torch.float32), *weights)
    return y
