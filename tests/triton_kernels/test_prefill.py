"""Prefill against a float64 chain, on the GPU if there is one, else in Triton's interpreter; and its products."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from aot import compile_requests, launch_request
from random_chains import drawn, error
from torch import Tensor

from dlr_lock.triton_kernels import ChainWeights, gram_blocks
from dlr_lock.triton_kernels.gpu import H200
from dlr_lock.triton_kernels.lookahead import block_steps, gram_steps, own_tiles
from dlr_lock.triton_kernels.matmul import Product, View, matmul_memory
from dlr_lock.triton_kernels.prefill import prefill
from dlr_lock.triton_kernels.rounds import Shape, chunk_tokens
from dlr_lock.triton_kernels.tiles import Tile, Work, tile_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Execute = Callable[..., Any]


def run(x: Tensor, chain: ChainWeights, block: int, scratch: int, broken: bool = False) -> Tensor:
    x, chain = x.to(DEVICE), chain.to(DEVICE)
    gram = gram_blocks(chain.A, chain.B, block=block)
    if broken:
        own_tiles(gram, gram_steps(gram) - 1)[:, 0, : chain.A.shape[2]] = (
            0  # what the last step reads of the first
        )
    return prefill(x, chain, gram, H200, scratch=scratch).cpu()


@pytest.mark.parametrize(
    ("lanes", "depth", "rank", "hidden", "tokens", "block", "act"),
    [
        (1, 6, 16, 96, 40, 32, "silu"),  # rounds of two steps
        (3, 7, 16, 96, 5, 48, "gelu"),  # a ragged last one, lanes that are summed
        (2, 4, 48, 80, 70, 512, "relu"),  # one round; a rank that is no power of two
        (1, 4, 16, 64, 1, 512, "silu"),
        (1, 5, 16, 33, 300, 32, "silu"),  # chunks, the last one ragged; odd features
        (2, 20, 16, 32, 7, 512, "silu"),  # a whole solve of 16 steps, and a ragged one
        (2, 3, 336, 32, 7, 1024, "silu"),  # wide steps, all in one round
        (1, 7, 144, 48, 7, 432, "gelu"),  # three a round, the last one alone
        (2, 5, 192, 48, 20, 400, "silu"),  # two
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
    chain, x = drawn(lanes, depth, rank, hidden, act=act), torch.randn(tokens, hidden)
    y = execute(run, x, chain, block, 1)  # no scratch: chunks of 128 tokens
    assert y.shape == x.shape and error(y, x, chain) < 1e-6
    if block_steps(block, depth, rank) > 1:  # a block of one step has no Gram matrix to break
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
    tokens = chunk_tokens(Shape(*shape, tokens=1), 512)
    assert tokens % 128 == 0
    assert lanes * tokens * (hidden * (4 + 2) + 512 * (4 + 2)) <= 256 * 2**20


FORMS = ["product", "hidden", "state", "finish"]
TARGETS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB a program


def product_request(target: str, form: str, tokens: int) -> dict[str, Any]:
    """A launch of a round at d = 4096, m = 512."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def product(columns: int, inner: int, **views: Any) -> Product:
        tile = tile_for(Work(tokens, columns, inner), H200)
        views = {"a": View(inner), "w": View(columns), "out": View(columns)} | views
        return Product(lanes=1, columns=columns, inner=inner, tile=tile, act="silu", **views)

    u, vector = meta(tokens, 1, 4096, dtype=torch.float32), meta(4096, dtype=torch.float32)
    z, H, W = meta(tokens, 1, 4096), meta(tokens, 1, 512), meta(512, 4096)
    P, read = u[..., :512], View(1, column=4096)
    memory = {"parts": u, "turns": meta(1, dtype=torch.int32)}
    calls = {
        "product": lambda: product(512, 4096, w=read)(tokens, 0, z, W, P, **memory),
        "hidden": lambda: product(512, 4096, w=read, active=512)(tokens, 0, z, W, P, hidden=H, **memory),
        "state": lambda: product(4096, 512, z=View(4096), total=True)(
            tokens, 0, H, W, u, total=u, x=z, z=z, **memory
        ),
        "finish": lambda: product(4096, 512, total=True, finish=True)(
            tokens, 0, H, W, z, total=u, scale=vector, bias=vector, **memory
        ),
    }
    return launch_request("dlr_lock.triton_kernels.matmul:matmul_kernel", target, calls[form])


def test_products_compile_for_every_target_without_spills() -> None:
    cases = [(target, form, 4096) for target in TARGETS for form in FORMS]
    cases += [
        ("sm_90", "state", 1),
        ("gfx942", "product", 16),
        ("sm_90", "state", 512),
        ("sm_90", "hidden", 64),
    ]
    found = compile_requests([product_request(*case) for case in cases])
    for (target, form, tokens), got in zip(cases, found, strict=True):
        assert "error" not in got, got["error"]
        assert (got["stack"], got["local"]) == (0, 0), f"{target} {form} at {tokens} tokens spills: {got}"
        assert got["shared"] <= SHARED[target] * 1024, f"{target} {form}: {got}"
        assert got["matrix"] and (tokens < 64 or got["matrix"] == [TARGETS[target]])
        if (target, tokens) == ("sm_90", 4096):  # two programs of 256 threads a multiprocessor
            assert got["registers"] <= 128, f"{form}: {got}"


def one_product(a: Tensor, W: Tensor, total: Tensor, tile: Tile) -> list[Tensor]:
    """total + a W from column 40 on, and relu of it before, NaN elsewhere: twice; and what is left of the turns."""
    (tokens, inner), size = a.shape, W.shape[1]
    product = Product(
        lanes=1, columns=size, inner=inner, tile=tile, a=View(inner), w=View(size), out=View(size), total=True,
        active=40, act="relu",
    )  # fmt: skip
    a, W, total = a.to(DEVICE), W.to(DEVICE), total.to(DEVICE)
    memory = matmul_memory([product], tokens, a.device)
    outs = [torch.full((2, *total.shape), torch.nan, device=DEVICE) for _ in range(2)]
    for out in outs:
        product(tokens, 0, a, W, out[0], hidden=out[1], total=total, **memory)
    return [t.cpu() for t in (*outs, memory.get("turns", torch.zeros(1)))]


@pytest.mark.parametrize("split", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [(16, 64), (128, 128)])  # the second ends in quarters
def test_a_product_in_parts_and_its_columns(execute: Execute, size: tuple[int, int], split: int) -> None:
    """The same bits every time; ragged tiles, and at 7 a part that has nothing."""
    a, W, total = torch.randn(150, 100), torch.randn(100, 200), torch.randn(150, 200)
    first, second, turns = execute(one_product, a, W, total, Tile(*size, 16, split=split))
    wanted = total.double() + a.double() @ W.double()
    assert first[0, :, :40].isnan().all() and first[1, :, 40:].isnan().all()
    got = torch.cat([first[1, :, :40], first[0, :, 40:]], 1)
    wanted[:, :40] = wanted[:, :40].relu()
    assert (got - wanted).norm() / wanted.norm() < 1e-6
    assert torch.equal(first.nan_to_num(), second.nan_to_num()) and not turns.any()
