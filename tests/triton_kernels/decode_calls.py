"""Plans and calls of the decode kernels for tests, and the result that they want."""

import math
from typing import NamedTuple

import torch

from dlr_lock.triton_kernels import ChainWeights, chain_reference
from dlr_lock.triton_kernels.decode_plan import DecodePlan


def make_plan(
    K: int,
    r: int,
    d: int,
    *,
    tokens: int,
    rows: int,
    columns: int,
    tiles: int = 1,
    held: int = 1,
    width: int = 0,
) -> DecodePlan:
    """A plan of exactly these numbers; tiles: of columns that a CTA has, for several tokens; width: for one, not all
    columns of a tile."""
    return DecodePlan(K, r, d, tokens, rows, columns, width or columns * tiles, held)


class Call(NamedTuple):
    """What `decode` takes beside a plan."""

    x: torch.Tensor
    chain: ChainWeights


def make_call(plan: DecodePlan, T: int, seed: int = 0, act="silu", dtype=torch.float64, device="cpu") -> Call:
    """A call for a plan; updates as large as x."""
    generator = torch.Generator().manual_seed(seed)
    K, r, d = plan.depth, plan.rank, plan.hidden

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B = draw(1, K, r, d) / math.sqrt(d), 1.5 * draw(1, K, r, d) / math.sqrt(K * r)
    x, scale, bias = draw(T, d), draw(d), draw(d)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    chain = ChainWeights(A.to(dtype), B.to(dtype), scale.to(state), bias.to(state), act=act).to(device)
    return Call(x.to(device, dtype), chain)


def wanted(call: Call) -> torch.Tensor:
    """y by the definition, in float64 on the same weights."""
    return chain_reference(call.x.double(), call.chain.to(torch.float64))


def assert_same(y: torch.Tensor, reference: torch.Tensor, ratio: float) -> None:
    error = (y.double() - reference).square().mean().sqrt() / reference.square().mean().sqrt()
    assert error <= ratio, f"RMS error {error:.2e} of the output's"
