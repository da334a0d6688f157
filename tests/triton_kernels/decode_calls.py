"""Plans and calls of the decode kernel for tests, and the result that they want."""

import math
from typing import NamedTuple

import torch

from dlr_lock.triton_kernels import ChainWeights, chain_reference
from dlr_lock.triton_kernels.decode_plan import DecodePlan


def make_plan(L: int, K: int, r: int, d: int, S: int, C: int, tile: int = 0, **options) -> DecodePlan:
    """A plan of exactly these numbers; tile 0: the whole slice. A step is one part unless options say so."""
    width = math.ceil(d / C / 16) * 16
    tile = tile or max(16, 1 << (width - 1).bit_length())
    options = {"tokens": 16, "part": max(16, 1 << (r - 1).bit_length())} | options
    return DecodePlan(lanes=L, depth=K, rank=r, hidden=d, steps=S, slices=C, tile=tile, **options)


class Call(NamedTuple):
    """What `decode` takes beside a plan and its workspace."""

    x: torch.Tensor
    chain: ChainWeights
    gram: torch.Tensor | None


def make_call(
    plan: DecodePlan, T: int, seed: int = 0, blocks: int = 2, act="silu", dtype=torch.float64, device="cpu"
) -> Call:
    """A call for a plan, with Gram blocks of `blocks` rounds; updates as large as x."""
    generator = torch.Generator().manual_seed(seed)
    L, K, r, d = plan.lanes, plan.depth, plan.rank, plan.hidden

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B = draw(L, K, r, d) / math.sqrt(d), 1.5 * draw(L, K, r, d) / math.sqrt(K * r)
    x, scale, bias = draw(T, d), draw(d), draw(d)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    chain = ChainWeights(A.to(dtype), B.to(dtype), scale.to(state), bias.to(state), act=act).to(device)
    return Call(x.to(device, dtype), chain, stored_gram(chain.A, chain.B, blocks * plan.steps))


def stored_gram(A: torch.Tensor, B: torch.Tensor, steps: int) -> torch.Tensor:
    """[L, N, m, m] for blocks of `steps` steps: B_j A_i^T at (j, i) for j before i, else zero."""
    L, K, r, d = A.shape
    dtype, pad = A.dtype, (0, 0, 0, 0, 0, -K % steps)
    A, B = (torch.nn.functional.pad(w.double(), pad).reshape(L, -1, steps * r, d) for w in (A, B))
    before = torch.ones(steps, steps, dtype=torch.bool, device=A.device).triu(1)
    mask = before.repeat_interleave(r, 0).repeat_interleave(r, 1)
    return ((B @ A.mT) * mask).to(dtype)


def wanted(call: Call) -> torch.Tensor:
    """y by the definition, in float64 on the same weights."""
    return chain_reference(call.x.double(), call.chain.to(torch.float64))


def assert_same(y: torch.Tensor, reference: torch.Tensor, ratio: float) -> None:
    error = (y.double() - reference).square().mean().sqrt() / reference.square().mean().sqrt()
    assert error <= ratio, f"RMS error {error:.2e} of the output's"
