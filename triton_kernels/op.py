"""One op per DLR-Net: `torch.ops.dlr_lock.dlr_net`, with kernels for CPU and CUDA, a fake one and a raising one.

torch.compile takes it into a graph without a break (the fake kernel gives the shape), and a CUDA graph captures
it: nothing in it waits for the device, and its memory comes from torch's allocator.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backend import current_backend
from .cost import gram_width
from .lookahead import check_gram, gram_blocks, lookahead, without_autocast
from .reference import chain_reference, check_chain

# Below, the plain chain is faster on a CPU: at one token 0.75 to 0.85 ms against 0.86 to 0.95 (1x36x64, d = 576, cached
# weights), for look-ahead's Gram blocks are read too. 16-bit weights are summed in float32 by look-ahead alone.
_FEW_TOKENS = 4
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


def _plain(
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
        raise ValueError(f"backend 'triton' wants tensors on a CUDA or ROCm device, not on {x.device}")
    _check(x, A, B, scale, bias, G, act, gram)
    with without_autocast(x.device.type):
        if backend == "auto" and x.numel() < _FEW_TOKENS * x.shape[-1] and A.itemsize >= 4:
            return chain_reference(x, A, B, scale, bias, G, act)
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

    _check(x, A, B, scale, bias, G, act, gram)
    reason = why_not(A, act)
    if reason and backend == "triton":
        raise ValueError(f"backend 'triton' {reason}")
    # Triton launches on the current device, whatever the tensors'.
    with torch.cuda.device(x.device), without_autocast("cuda"):
        if gram is None:
            width = gram_width(tuple(A.shape), G is not None, A.itemsize, A.device)
            gram = gram_blocks(A, B, G, block=width)
        if reason or backend == "lookahead":
            return lookahead(x, A, B, scale, bias, G, act, gram=gram)
        tokens = x.reshape(-1, x.shape[-1])
        vectors = scale.float().contiguous(), bias.float().contiguous()
        return run(tokens, A, B, *vectors, G, act, gram.contiguous()).reshape(x.shape)


def _check(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    bias: Tensor,
    G: Tensor | None,
    act: str,
    gram: Tensor | None,
) -> None:
    """Raises ValueError on what the kernels would read or write out of bounds, or as something else."""
    check_chain(x, A, B, G, act)
    if not scale.shape == bias.shape == A.shape[-1:]:
        raise ValueError(
            f"scale and bias must be [{A.shape[-1]}], not {list(scale.shape)}, {list(bias.shape)}"
        )
    if gram is not None:
        check_gram(gram, A, G)
    _check_devices(x, A, B, scale, bias, G, gram)


def _check_devices(*tensors: Tensor | None) -> None:
    devices = {str(t.device) for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"a chain on several devices: {', '.join(sorted(devices))}")


def _fake(
    x: Tensor, A: Tensor, B: Tensor, scale: Tensor, bias: Tensor, G: Tensor | None, act: str,
    gram: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    # Sizes may be symbols here: the real kernels look at the rest.
    _check_devices(x, A, B, scale, bias, G, gram)
    torch._check(
        x.shape[-1] == A.shape[-1], lambda: f"{x.shape[-1]} features do not fit a chain of {A.shape[-1]}"
    )
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _autograd(*args: Tensor | str | None) -> Tensor:
    tensors = [t for t in args if isinstance(t, Tensor)]
    dual = forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )
    if dual or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        raise RuntimeError(
            "a DLR-Net's fused forward has no backward: run inference under torch.no_grad(), or train through "
            "the plain chain, forward and backward within `with dlr_lock.backend('naive'):` or with "
            "DLR_LOCK_BACKEND=naive"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.dlr_lock.dlr_net(*args)


_library = torch.library.Library("dlr_lock", "DEF")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("dlr_net", _plain, "CompositeExplicitAutograd")  # the CPU and whatever has no kernels here
_library.impl("dlr_net", _cuda, "CUDA")
_library.impl("dlr_net", _autograd, "Autograd")
torch.library.register_fake("dlr_lock::dlr_net", _fake, lib=_library)
