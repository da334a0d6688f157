"""Experts' chains in one call: against float64, expert by expert, in plain torch and by the grouped kernel.

The interpreter computes bf16 wrongly; on a machine without a GPU the 16-bit path is tested in float16.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from aot import compile_requests, launch_request
from torch import Tensor

from dlr_lock import backend
from dlr_lock.triton_kernels import ExpertChains, chain_reference, dlr_experts, experts_reference, grouped
from dlr_lock.triton_kernels.experts_kernel import run_experts

Execute = Callable[..., Tensor]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
# RMS error over RMS; 16 bits round every h and the state before it is read
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def random_chains(
    E: int, K: int, r: int, d: int, dtype: torch.dtype = torch.float32, act: str = "silu"
) -> ExpertChains:
    A = torch.randn(E, K, r, d) / d**0.5
    B = torch.randn(E, K, r, d) / (K * r) ** 0.5
    return ExpertChains(A.to(dtype), B.to(dtype), torch.rand(E, d) + 0.5, torch.randn(E, d), act)


def routed(
    S: int, experts: list[int], E: int, d: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Tokens sorted by expert, each one of `experts`, and where each of E ends."""
    index = torch.tensor(experts)[torch.randint(len(experts), (S,))]
    return torch.randn(S, d).to(dtype), grouped(index, E)[1]


def by_hand(x: Tensor, ends: Tensor, chains: ExpertChains) -> Tensor:
    """Float64, one token at a time."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(len(chains.A)):
        begin = int(ends[expert - 1]) if expert else 0
        chain = chains.chain(expert).to(torch.float64)
        for row in range(begin, int(ends[expert])):
            y[row] = chain_reference(x[row].double(), chain)
    return y


def error(y: Tensor, wanted: Tensor) -> float:
    return ((y.double() - wanted).norm() / wanted.norm()).item()


def on_device(x: Tensor, ends: Tensor, chains: ExpertChains) -> Tensor:
    parts = [part.to(DEVICE) for part in chains[:4]]
    return run_experts(x.to(DEVICE), ends.to(DEVICE), ExpertChains(*parts, act=chains.act)).cpu()


# tokens, experts that get some, E, K, r, d: one of many; all of one; more than a tile each; a ragged width
SHAPES = [
    (5, [2], 4, 3, 16, 40),
    (70, [0, 3, 4], 5, 2, 48, 96),
    (150, [0, 1], 2, 2, 32, 64),
    (1, [6], 7, 1, 16, 72),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(
    execute: Execute, shape: tuple[int, list[int], int, int, int, int], dtype: torch.dtype
) -> None:
    S, some, E, K, r, d = shape
    chains, (x, ends) = random_chains(E, K, r, d, dtype), routed(S, some, E, d, dtype)
    assert error(execute(on_device, x, ends, chains), by_hand(x, ends, chains)) < BOUNDS[dtype]


@pytest.mark.parametrize("act", ["gelu", "relu2"])
def test_kernel_activations(execute: Execute, act: str) -> None:
    chains, (x, ends) = random_chains(3, 2, 16, 48, act=act), routed(20, [0, 2], 3, 48)
    assert error(execute(on_device, x, ends, chains), by_hand(x, ends, chains)) < BOUNDS[torch.float32]


@pytest.mark.parametrize("form", ["auto", "plain", "lookahead", "naive"])
@pytest.mark.parametrize("S", [3, 90])
def test_every_backend(form: str, S: int) -> None:
    chains, (x, ends) = random_chains(4, 3, 16, 40), routed(S, [0, 1, 3], 4, 40)
    with backend(form), torch.no_grad():
        assert error(dlr_experts(x, ends, chains), by_hand(x, ends, chains)) < 2e-6


def test_rows_of_no_expert_are_zero(execute: Execute) -> None:
    """Routers may name an expert behind the last one for none."""
    chains = random_chains(3, 2, 16, 40)
    order, ends = grouped(torch.tensor([1, 3, 0, 7, 1]), 3)
    assert order.tolist() == [2, 0, 4, 1, 3] and ends.tolist() == [1, 3, 3]
    x = torch.randn(5, 40)
    for y in (
        experts_reference(x, ends, chains),
        dlr_experts(x, ends, chains),
        execute(on_device, x, ends, chains),
    ):
        assert y[:3].all() and not y[3:].any()


def test_no_tokens() -> None:
    chains = random_chains(3, 2, 16, 40)
    nothing = torch.zeros(3, dtype=torch.int32)
    assert dlr_experts(torch.empty(0, 40), nothing, chains).shape == (0, 40)
    assert not dlr_experts(torch.randn(2, 40), nothing, chains).any()


def test_trained_by_the_definition_alone() -> None:
    chains, (x, ends) = random_chains(2, 2, 16, 40), routed(6, [0, 1], 2, 40)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="no backward"):
        dlr_experts(x, ends, chains)
    with backend("naive"):
        dlr_experts(x, ends, chains).sum().backward()
    assert x.grad is not None and x.grad.all()


def test_what_does_not_fit_is_refused() -> None:
    chains, (x, ends) = random_chains(2, 2, 16, 40), routed(6, [0, 1], 2, 40)
    for wrong in (
        lambda: experts_reference(x[:, :39], ends, chains),
        lambda: experts_reference(x, ends[:1], chains),
        lambda: experts_reference(x, ends, chains._replace(B=chains.B[:, :1])),
        lambda: experts_reference(x, ends, chains._replace(scale=chains.scale[:1])),
        lambda: experts_reference(x, ends, chains._replace(act="nothing")),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_the_op_is_one() -> None:
    chains, (x, ends) = random_chains(2, 2, 16, 40), routed(6, [0, 1], 2, 40)
    A, B, scale, bias, act = chains
    torch.library.opcheck(torch.ops.dlr_lock.dlr_experts, (x, ends, A, B, scale, bias, act, "plain"))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_other_gpus(target: str) -> None:
    """It compiles for GPUs that are not here, spills nothing, and multiplies on the matrix units."""
    shape = dict(dtype=torch.bfloat16, device="meta")
    E, K, r, d = 8, 12, 96, 2048
    weights = [torch.empty(E, K, r, d, **shape) for _ in "AB"]
    vectors = [torch.empty(E, d, device="meta") for _ in "sb"]
    ends = torch.empty(E, dtype=torch.int32, device="meta")
    requests = [
        launch_request(
            "dlr_lock.triton_kernels.experts_kernel:experts_kernel",
            target,
            partial(run_experts, torch.empty(tokens, d, **shape), ends, ExpertChains(*weights, *vectors)),
        )
        for tokens in (8, 4000)
    ]
    for found in compile_requests(requests):
        assert "error" not in found, found["error"]
        assert (found["stack"], found["local"]) == (0, 0) and found["matrix"], found
