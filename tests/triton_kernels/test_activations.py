"""The table of activations: its forms agree with transformers' and with each other, and a CPU needs no Triton."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from transformers.activations import ACT2FN

from dlr_lock.triton_kernels import ACTIVATIONS
from dlr_lock.triton_kernels.activations import KERNEL_ACTS, TABLE, triton_form

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_every_activation_of_transformers(name: str) -> None:
    p = torch.linspace(-12, 12, 4001)
    with torch.no_grad():
        wanted = ACT2FN[name].float()(p)
    # xielu's constants are stored in bf16 over there
    tolerance = 1e-2 if name == "xielu" else 2e-6
    torch.testing.assert_close(ACTIVATIONS[name](p), wanted, rtol=tolerance, atol=tolerance)


def test_no_name_stands_twice() -> None:
    assert len(ACTIVATIONS) == sum(len(activation.names) for activation in TABLE)


@triton.jit
def activation_kernel(p_p, p_y, N: tl.constexpr, ACT: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(p_y + o_n, ACT(tl.load(p_p + o_n)))


def activated(p: Tensor, act: str) -> Tensor:
    p = p.to(DEVICE)
    y = torch.empty_like(p)
    activation_kernel[(1,)](p, y, N=p.numel(), ACT=triton_form(act))
    return y.cpu()


@pytest.mark.parametrize("act", sorted(KERNEL_ACTS))
def test_the_triton_form_is_the_torch_function(execute: Callable[..., Tensor], act: str) -> None:
    far = torch.tensor([30.0, 89.0, 100.0, 1e4])
    p = torch.cat([torch.linspace(-12, 12, 1015), far, -far, torch.tensor([torch.nan])])
    y = execute(activated, p, act)
    assert y[-1].isnan(), "a NaN must not be hidden"
    wanted = ACTIVATIONS[act](p.double())
    torch.testing.assert_close(y.double(), wanted, rtol=2e-6, atol=5e-7, equal_nan=True)


def test_a_cpu_needs_no_triton() -> None:
    program = """if True:
        import sys
        import torch
        sys.modules["triton"] = None  # as where it is not installed: importing it fails
        from dlr_lock.triton_kernels import ChainWeights, dlr_net, gram_blocks
        x, A = torch.ones(3, 16), torch.ones(1, 2, 16, 16)
        dlr_net(x, ChainWeights(A, A, x[0], x[0]), gram_blocks(A, A))
    """
    subprocess.run([sys.executable, "-c", program], check=True)
