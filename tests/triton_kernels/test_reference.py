"""The reference against the formula of design, written again token by token in float64 numpy."""

import math

import numpy as np
import pytest
import torch

from dlr_lock.triton_kernels import chain_reference, flattened_reference, lane_updates

NUMPY_ACTS = {
    "silu": lambda p: p / (1 + np.exp(-p)),
    "relu": lambda p: np.maximum(p, 0),
    "tanh": np.tanh,
}


def random_chain(L: int, K: int, r: int, d: int, T: int, gated: bool, dtype: torch.dtype = torch.float64):
    """A chain whose updates are about as large as x, on fresh random numbers."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, G = draw(L, K, r, d) / math.sqrt(d), draw(L, K, r, d) / math.sqrt(d)
    B = 1.5 * draw(L, K, r, d) / math.sqrt(K * r)
    x, scale, bias = draw(T, d), draw(d), draw(d)
    return x.to(dtype), A.to(dtype), B.to(dtype), scale, bias, G.to(dtype) if gated else None


def by_hand(x, A, B, scale, bias, G, act, flat=False):
    x, A, B, scale, bias = (t.double().numpy() for t in (x, A, B, scale, bias))
    f = NUMPY_ACTS[act]
    y = np.zeros_like(x)
    for t in range(len(x)):
        for lane in range(A.shape[0]):
            z = x[t].copy()
            for k in range(A.shape[1]):
                reads = x[t] if flat else z
                p = A[lane, k] @ reads
                h = f(p) if G is None else f(G.double().numpy()[lane, k] @ reads) * p
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
    chain = random_chain(L, K, r, d, T, gated)
    wanted = by_hand(*chain, act)
    torch.testing.assert_close(chain_reference(*chain, act), wanted, rtol=1e-10, atol=1e-10)
    flat = by_hand(*chain, act, flat=True)
    torch.testing.assert_close(flattened_reference(*chain, act), flat, rtol=1e-10, atol=1e-10)
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
    x, A, B, scale, bias, G = random_chain(1, 36, 64, 192, 64, gated, dtype)
    if gated:
        B = B / 2  # a product of two normal variables is heavier-tailed: keep the coupling near one
    wanted = chain_reference(
        x.double(), A.double(), B.double(), scale, bias, None if G is None else G.double()
    )
    got = chain_reference(x, A, B, scale, bias, G)
    assert got.dtype == dtype
    assert (got.double() - wanted).norm() / wanted.norm() < bound


def test_leading_shapes_are_kept_and_no_tokens_are_fine() -> None:
    x, A, B, scale, bias, _ = random_chain(1, 3, 16, 24, 6, False)
    flat = chain_reference(x, A, B, scale, bias)
    assert torch.equal(chain_reference(x.view(2, 3, 24), A, B, scale, bias), flat.view(2, 3, 24))
    assert chain_reference(x[:0], A, B, scale, bias).shape == (0, 24)


def test_gradients_of_every_argument() -> None:
    x, A, B, scale, bias, G = random_chain(2, 3, 16, 8, 3, True)
    arguments = [t.requires_grad_() for t in (x, A, B, scale, bias, G)]
    assert torch.autograd.gradcheck(chain_reference, arguments)


def test_lane_updates_sum_to_the_output() -> None:
    x, A, B, scale, bias, _ = random_chain(3, 4, 16, 24, 5, False)
    updates = lane_updates(x, A, B)
    assert updates.shape == (3, 5, 24)
    torch.testing.assert_close(scale * updates.sum(0) + bias, chain_reference(x, A, B, scale, bias))


def test_what_does_not_fit_is_named() -> None:
    x, A, B, scale, bias, _ = random_chain(1, 3, 16, 24, 6, False)
    with pytest.raises(ValueError, match="23 features"):
        chain_reference(x[:, 1:], A, B, scale, bias)
    with pytest.raises(ValueError, match="one shape"):
        chain_reference(x, A, B[:, :2], scale, bias)
    with pytest.raises(ValueError, match="siluu"):
        chain_reference(x, A, B, scale, bias, None, "siluu")
