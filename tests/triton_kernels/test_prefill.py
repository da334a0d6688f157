"""Prefill against a float64 chain, on the GPU if there is one, else in Triton's interpreter; and its products."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from aot import compile_requests, launch_request
from torch import Tensor

from dlr_lock.triton_kernels import ChainWeights, chain_reference, gram_blocks
from dlr_lock.triton_kernels.matmul import matmul
from dlr_lock.triton_kernels.prefill import chunk_tokens, prefill

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Execute = Callable[..., Any]


def drawn(lanes: int, depth: int, rank: int, hidden: int, act: str = "silu") -> ChainWeights:
    shape = (lanes, depth, rank, hidden)
    A, B = torch.randn(shape) / hidden**0.5, torch.randn(shape) / (depth * rank) ** 0.5
    return ChainWeights(A, B, torch.rand(hidden), torch.randn(hidden), act=act)


def run(x: Tensor, chain: ChainWeights, block: int, scratch: int, broken: bool = False) -> Tensor:
    x, chain = x.to(DEVICE), chain.to(DEVICE)
    gram = gram_blocks(chain.A, chain.B, block=block)
    if broken:
        rank = chain.A.shape[2]
        gram[:, 0, :rank, -rank:] = 0  # what the block's last step reads of its first
    return prefill(x, chain, gram, scratch=scratch).cpu()


def error(y: Tensor, x: Tensor, chain: ChainWeights) -> float:
    wanted = chain_reference(x.double(), chain.to(torch.float64))
    return float((y - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("lanes", "depth", "rank", "hidden", "tokens", "block", "act"),
    [
        (1, 6, 16, 96, 40, 32, "silu"),  # rounds of two steps
        (3, 7, 16, 96, 5, 48, "gelu"),  # a ragged last one, lanes that are summed
        (2, 4, 48, 80, 70, 512, "relu"),  # one round; a rank that is no power of two
        (1, 4, 16, 64, 1, 512, "silu"),
        (1, 5, 16, 33, 300, 32, "silu"),  # chunks, the last one ragged; odd features
        (2, 50, 16, 32, 7, 512, "silu"),  # a block of two solves, and a ragged one
        (1, 40, 16, 32, 7, 4096, "silu"),  # one round of several solves
        (2, 3, 336, 32, 7, 1024, "silu"),  # a step wider than half a solve
        (1, 3, 576, 48, 7, 576, "silu"),  # and one wider than a solve
        (2, 4, 48, 80, 70, 48, "gelu"),  # blocks of one step: the activation follows the product
        (3, 1, 32, 64, 9, 512, "relu"),  # a single step, as an MLP is
    ],
)
def test_is_the_chain(
    execute: Execute,
    lanes: int,
    depth: int,
    rank: int,
    hidden: int,
    tokens: int,
    block: int,
    act: str,
) -> None:
    chain, x = drawn(lanes, depth, rank, hidden, act), torch.randn(tokens, hidden)
    y = execute(run, x, chain, block, 1)  # no scratch: chunks of 128 tokens
    assert y.shape == x.shape and error(y, x, chain) < 1e-6
    if min(depth, block // rank) > 1:  # a block of one step has no Gram matrix to break
        assert error(execute(run, x, chain, block, 1, True), x, chain) > 1e-4


def test_a_token_of_nan_stays_alone(execute: Execute) -> None:
    chain, x = drawn(2, 6, 16, 48), torch.randn(70, 48)
    clean = execute(run, x, chain, 48, 2**20)
    x[37, 5] = torch.nan
    y = execute(run, x, chain, 48, 2**20)
    assert y[37].isnan().all()
    y[37] = clean[37]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("shape", [(1, 64, 336, 4096), (64, 12, 32, 4096), (1, 36, 64, 576)])
def test_scratch_stays_under_its_bound(shape: tuple[int, ...]) -> None:
    lanes, _, _, hidden = shape
    tokens = chunk_tokens(shape, 512, itemsize=2)
    assert tokens % 128 == 0
    assert lanes * tokens * (hidden * (4 + 2) + 512 * (4 + 2)) <= 256 * 2**20


FORMS = ["product", "hidden", "state", "finish"]
TARGETS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB a program


def product_request(target: str, form: str, tokens: int) -> dict[str, Any]:
    """A launch of a round at d = 4096, m = 512."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    u, vector = meta(1, tokens, 4096, dtype=torch.float32), meta(4096, dtype=torch.float32)
    H, B = meta(1, tokens, 512), meta(1, 512, 4096)
    calls = {
        "product": lambda: matmul(meta(1, tokens, 4096), B.mT, meta(1, tokens, 512, dtype=torch.float32)),
        "hidden": lambda: matmul(meta(1, tokens, 4096), B.mT, H, act="silu"),
        "state": lambda: matmul(H, B, u, total=u, state=(meta(tokens, 4096), meta(1, tokens, 4096))),
        "finish": lambda: matmul(H, B, meta(1, tokens, 4096), total=u, finish=(vector, vector)),
    }
    return launch_request("dlr_lock.triton_kernels.matmul:matmul_kernel", target, calls[form])


def test_products_compile_for_every_target_without_spills() -> None:
    cases = [(target, form, 4096) for target in TARGETS for form in FORMS]
    cases += [("sm_90", "state", 1), ("gfx942", "product", 16)]
    found = compile_requests([product_request(*case) for case in cases])
    for (target, form, tokens), got in zip(cases, found, strict=True):
        assert "error" not in got, got["error"]
        assert (got["stack"], got["local"]) == (0, 0), f"{target} {form} at {tokens} tokens spills: {got}"
        assert got["shared"] <= SHARED[target] * 1024, f"{target} {form}: {got}"
        assert got["matrix"] and (tokens < 64 or got["matrix"] == [TARGETS[target]])
