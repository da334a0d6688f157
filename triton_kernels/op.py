"""One op per DLR-Net: `torch.ops.dlr_lock.dlr_net`, with kernels for CPU and CUDA, a fake one and a raising one.

torch.compile takes it into a graph without a break (the fake kernel gives the shape), and a CUDA graph captures
it: nothing in it waits for the device, and its memory comes from torch's allocator.
"""

import torch
from torch import Tensor

from .backend import current_backend
from .cost import gram_width
from .lookahead import gram_blocks, lookahead
from .reference import chain_reference, check_chain

_SCHEMA = (
    "dlr_net(Tensor x, Tensor A, Tensor B, Tensor scale, Tensor bias, Tensor? G, str act, Tensor? gram, "
    "str backend) -> Tensor"
)


def dlr_net(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    bias: Tensor,
    G: Tensor | None = None,
    act: str = "silu",
    gram: Tensor | None = None,
) -> Tensor:
    """Output of a DLR-Net by the current backend: see `backend`; inference only, but for 'naive'.

    x: [..., d]; A, B, G: [L, K, r, d] of one float dtype; scale, bias: [d] float32; gram: what `gram_blocks` gave
    for these weights, without which it is computed in every call. Returns y: [..., d] in x's dtype.
    Raises ValueError on shapes, an activation or a device that do not fit, and RuntimeError where a gradient
    would be wanted.
    """
    backend = current_backend()
    if backend == "naive":
        return chain_reference(x, A, B, scale, bias, G, act)
    return torch.ops.dlr_lock.dlr_net(x, A, B, scale, bias, G, act, gram, backend)


def _cpu(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    bias: Tensor,
    G: Tensor | None,
    act: str,
    gram: Tensor | None,
    backend: str,
) -> Tensor:
    if backend == "triton":
        raise ValueError("backend 'triton' wants tensors on a CUDA or ROCm device, not on the CPU")
    return lookahead(x, A, B, scale, bias, G, act, gram=gram)


def _cuda(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    bias: Tensor,
    G: Tensor | None,
    act: str,
    gram: Tensor | None,
    backend: str,
) -> Tensor:
    # Imported at the first use: Triton is Linux only, and takes half a second.
    from .dispatch import run, why_not

    reason = why_not(A, act)
    if backend == "lookahead" or (backend == "auto" and reason):
        return lookahead(x, A, B, scale, bias, G, act, gram=gram)
    if reason:
        raise ValueError(f"backend 'triton' {reason}")
    tokens = x.reshape(-1, x.shape[-1])
    check_chain(tokens, A, B, G, act)
    if gram is None:
        width = gram_width(tuple(A.shape), G is not None, A.itemsize, A.device)
        gram = gram_blocks(A, B, G, block=width)
    return run(tokens, A, B, scale, bias, G, act, gram).reshape(x.shape)


def _fake(x: Tensor, A: Tensor, *rest: object) -> Tensor:
    torch._check(x.shape[-1] == A.shape[-1], lambda: f"{x.shape[-1]} features, a chain of {A.shape[-1]}")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _autograd(*args: Tensor | str | None) -> Tensor:
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
        raise RuntimeError(
            "a DLR-Net's fused forward has no backward: run inference under torch.no_grad(), or train through "
            "the plain chain with `with dlr_lock.backend('naive'):` or DLR_LOCK_BACKEND=naive"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.dlr_lock.dlr_net(*args)


_library = torch.library.Library("dlr_lock", "DEF")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("dlr_net", _cpu, "CPU")
_library.impl("dlr_net", _cuda, "CUDA")
_library.impl("dlr_net", _autograd, "Autograd")
torch.library.register_fake("dlr_lock::dlr_net", _fake, lib=_library)
