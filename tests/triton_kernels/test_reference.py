"""The reference against the formula of design, written again token by token in float64 numpy."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dlr_lock.triton_kernels import ChainWeights, chain_reference, dlr_net, flattened_reference, lane_updates

NUMPY_ACTS = {
    "silu": lambda p: p / (1 + np.exp(-p)),
    "relu": lambda p: np.maximum(p, 0),
    "tanh": np.tanh,
}


def random_chain(
    L: int, K: int, r: int, d: int, T: int, gated: bool = False, act: str = "silu"
) -> tuple[Tensor, ChainWeights]:
    """Tokens in float64, and a chain whose updates are about as large as x, on fresh random numbers."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, G = draw(L, K, r, d) / math.sqrt(d), draw(L, K, r, d) / math.sqrt(d)
    B = 1.5 * draw(L, K, r, d) / math.sqrt(K * r)
    x, scale, bias = draw(T, d), draw(d), draw(d)
    return x, ChainWeights(A, B, scale, bias, G if gated else None, act)


def by_hand(x: Tensor, chain: ChainWeights, flat: bool = False) -> Tensor:
    x, A, B, scale, bias, G = (None if t is None else t.numpy() for t in (x, *chain[:5]))
    f = NUMPY_ACTS[chain.act]
    y = np.zeros_like(x)
    for t in range(len(x)):
        for lane in range(A.shape[0]):
            z = x[t].copy()
            for k in range(A.shape[1]):
                reads = x[t] if flat else z
                p = A[lane, k] @ reads
                h = f(p) if G is None else f(G[lane, k] @ reads) * p
                z = z + h @ B[lane, k]
            y[t] += scale * (z - x[t])
    return torch.from_numpy(y + bias)


@pytest.mark.parametrize(
    ("L", "K", "r", "d", "T", "gated", "act"),
    [
        (1, 1, 16, 24, 1, False, "silu"),
        (1, 7, 16, 40, 5, False, "silu"),
        (3, 4, 32, 24, 6, False, "relu"),
        (1, 6, 16, 33, 4, True, "silu"),
        (2, 5, 16, 24, 3, True, "tanh"),
    ],
)
def test_the_formula(L: int, K: int, r: int, d: int, T: int, gated: bool, act: str) -> None:
    x, chain = random_chain(L, K, r, d, T, gated, act)
    wanted = by_hand(x, chain)
    torch.testing.assert_close(chain_reference(x, chain), wanted, rtol=1e-10, atol=1e-10)
    flat = by_hand(x, chain, flat=True)
    torch.testing.assert_close(flattened_reference(x, chain), flat, rtol=1e-10, atol=1e-10)
    if K > 1:
        assert (flat - wanted).norm() > 0.1 * wanted.norm(), "the chain is no chain: its steps read x alone"


@pytest.mark.parametrize(
    ("dtype", "bound"),
    # RMS error over RMS output, for strong coupling. bf16 rounds operands and products to 8 bits: measured
    # 4.7e-3; a state kept in bf16 gives 1.4e-2 and must fail.
    [(torch.float32, 2e-6), (torch.float16, 9e-4), (torch.bfloat16, 7e-3)],
)
@pytest.mark.parametrize("gated", [False, True])
def test_error_against_float64_on_the_same_weights(dtype: torch.dtype, bound: float, gated: bool) -> None:
    x, chain = random_chain(1, 36, 64, 192, 64, gated)
    chain = chain.to(dtype)._replace(scale=chain.scale, bias=chain.bias)
    if gated:  # a product of two normal variables is heavier-tailed: keep the coupling near one
        chain = chain._replace(B=chain.B / 2)
    x = x.to(dtype)
    wanted = chain_reference(x.double(), chain.to(torch.float64))
    got = chain_reference(x, chain)
    assert got.dtype == dtype
    assert (got.double() - wanted).norm() / wanted.norm() < bound


def test_leading_shapes_are_kept_and_no_tokens_are_fine() -> None:
    x, chain = random_chain(1, 3, 16, 24, 6)
    flat = chain_reference(x, chain)
    assert torch.equal(chain_reference(x.view(2, 3, 24), chain), flat.view(2, 3, 24))
    assert chain_reference(x[:0], chain).shape == (0, 24)


def test_gradients_of_every_argument() -> None:
    x, chain = random_chain(2, 3, 16, 8, 3, gated=True)
    arguments = [t.requires_grad_() for t in (x, *chain[:5])]
    assert torch.autograd.gradcheck(lambda x, *tensors: chain_reference(x, ChainWeights(*tensors)), arguments)


@pytest.mark.parametrize("gated", [False, True])
def test_compiles_into_one_graph_and_recomputes_in_a_checkpoint(gated: bool) -> None:
    x, chain = random_chain(2, 3, 16, 24, 5, gated, "tanh")
    chain = ChainWeights(*(t.requires_grad_() if isinstance(t, Tensor) else t for t in chain))
    wanted = chain_reference(x, chain)
    wanted.sum().backward()
    gradient, chain.A.grad = chain.A.grad, None
    compiled = torch.compile(chain_reference, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, chain), wanted)
    checkpoint(chain_reference, x, chain, use_reentrant=False).sum().backward()
    torch.testing.assert_close(chain.A.grad, gradient)


def test_lane_updates_sum_to_the_output() -> None:
    x, chain = random_chain(3, 4, 16, 24, 5)
    updates = lane_updates(x, chain)
    assert updates.shape == (3, 5, 24)
    torch.testing.assert_close(chain.scale * updates.sum(0) + chain.bias, chain_reference(x, chain))


@pytest.mark.parametrize("function", [chain_reference, lane_updates, flattened_reference])
def test_what_does_not_fit_is_named(function: Callable[..., Tensor]) -> None:
    x, chain = random_chain(1, 3, 16, 24, 6)
    with pytest.raises(ValueError, match="23 features"):
        function(x[:, 1:], chain)
    with pytest.raises(ValueError, match="one shape"):
        function(x, chain._replace(B=chain.B[:, :2]))
    with pytest.raises(ValueError, match="siluu"):
        function(x, chain._replace(act="siluu"))
    with pytest.raises(ValueError, match="scale and bias must be"):
        function(x, chain._replace(scale=chain.scale[:1]))


@pytest.mark.parametrize("name", ["A", "B", "scale", "bias"])
def test_a_chain_without_one_of_its_tensors_is_named(name: str) -> None:
    x, chain = random_chain(1, 2, 16, 32, 4, gated=False)
    with pytest.raises(ValueError, match=f"{name} of a chain must be a tensor, not NoneType"):
        dlr_net(x, chain._replace(**{name: None}))
