"""The block solve on GPUs that are not here: it compiles, spills nothing, and multiplies on the matrix units."""

from typing import Any

import pytest
import torch
from aot import compile_requests, launch_request

from dlr_lock.triton_kernels.solve import Solve

KERNEL = "dlr_lock.triton_kernels.solve:block_solve_kernel"
SHARED = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}  # bytes a program
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
TOKENS = 4099

Case = tuple[str, int, int, str]  # target, m, rank, activation

# m = 512 of the other ranks takes 5 to 20 s a compile.
CASES: list[Case] = [
    *((target, 256, rank, "silu") for target in ("sm_80", "sm_90") for rank in (16, 32, 48, 64, 128)),
    *((target, 256, rank, "silu") for target in ("sm_100", "gfx942") for rank in (16, 48, 128)),
    *((target, 512, 64, "silu") for target in ("sm_80", "sm_90")),
    ("sm_90", 512, 16, "silu"),
    ("sm_90", 256, 64, "gelu"),
    ("sm_80", 256, 64, "relu"),
    ("gfx942", 256, 64, "gelu"),
]


def request(
    target: str,
    m: int,
    rank: int,
    act: str,
    tokens: int = TOKENS,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """The request for the solve of blocks of at most m columns."""
    width = m // rank * rank
    P = torch.empty(tokens, 2, width, device="meta")
    steps = width // rank
    gram = torch.empty(2, 1, steps * (steps - 1) // 2 * rank, rank, dtype=dtype, device="meta")

    def call() -> None:
        solve = Solve(
            lanes=2, steps=steps, rank=rank, block=steps, blocks=1, tokens=tokens, dtype=dtype, act=act
        )  # fmt: skip
        solve(tokens, 0, P, gram, P.to(dtype))

    return launch_request(KERNEL, target, call)


@pytest.fixture(scope="module")
def compiled() -> dict[Case, dict[str, Any]]:
    return dict(zip(CASES, compile_requests([request(*case) for case in CASES]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-r{c[2]}-{c[3]}")
def test_resources(compiled: dict[Case, dict[str, Any]], case: Case) -> None:
    found = compiled[case]
    assert "error" not in found, found["error"]
    assert (found["stack"], found["local"]) == (0, 0), f"spills: {found}"
    assert found["shared"] <= SHARED[case[0]]
    assert found["matrix"] == [MATRIX[case[0]]]


def test_other_targets_few_tokens_and_float32_compile() -> None:
    """MI200 and MI350 allow fewer precisions; few tokens take other instructions, float32 on NVIDIA none of them."""
    cases: list[tuple[str, int, torch.dtype]] = [
        ("gfx90a", TOKENS, torch.bfloat16),
        ("gfx950", TOKENS, torch.bfloat16),
        ("sm_90", 1, torch.bfloat16),
        ("gfx942", 1, torch.bfloat16),
        ("sm_90", TOKENS, torch.float32),
    ]
    wanted = [request(target, 128, 64, "silu", tokens, dtype) for target, tokens, dtype in cases]
    for found, (target, _, dtype) in zip(compile_requests(wanted), cases, strict=True):
        assert "error" not in found, found["error"]
        if dtype == torch.bfloat16:
            assert found["stack"] == 0 and found["matrix"]
        else:
            assert not found["matrix"], f"{target} rounds float32 weights"
