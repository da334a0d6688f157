"""One op per DLR-Net: `torch.ops.dlr_lock.dlr_net`, with a kernel for all devices, a fake one and a raising one.

torch.compile takes it into a graph without a break (the fake kernel gives the shape), and a CUDA graph captures
it: nothing in it waits for the device, and its memory comes from torch's allocator.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .activations import KERNEL_ACTS
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

    A gated chain runs by its definition whatever the backend: gated steps make no lock, so nothing faster is kept for
    them.

    x: [..., d]; A, B, G: [L, K, r, d] of one float dtype; scale, bias: [d] float32; gram: what `gram_blocks` gave
    for these weights, without which it is computed in every call. Returns y: [..., d] in x's dtype.
    Raises ValueError on shapes, an activation or a device that do not fit, and RuntimeError where a gradient
    would be wanted.
    """
    backend = current_backend()
    if backend == "naive":
        return chain_reference(x, A, B, scale, bias, G, act)
    return torch.ops.dlr_lock.dlr_net(x, A, B, scale, bias, G, act, gram, backend)


def _run(
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
    _check(x, A, B, scale, bias, G, act, gram)
    reason = unsupported_reason(x, A, G, act)
    if reason and backend == "triton":
        raise ValueError(f"backend 'triton' {reason}")
    few = not x.is_cuda and x.numel() < _FEW_TOKENS * x.shape[-1] and A.itemsize >= 4
    # Triton launches on the current device, whatever the tensors'.
    device = torch.cuda.device(x.device) if x.is_cuda else nullcontext()
    with device, without_autocast(x.device.type):
        if G is not None or (few and backend == "auto"):
            return chain_reference(x, A, B, scale, bias, G, act)
        if gram is None:
            gram = gram_blocks(A, B, block=gram_width(A))
        if reason or backend == "lookahead":
            return lookahead(x, A, B, scale, bias, act, gram=gram)
        # Imported at the first use: Triton is Linux only, and takes half a second.
        from .dispatch import run

        tokens = x.reshape(-1, x.shape[-1])
        vectors = scale.float().contiguous(), bias.float().contiguous()
        return run(tokens, A, B, *vectors, act, gram.contiguous()).reshape(x.shape)


def unsupported_reason(x: Tensor, A: Tensor, G: Tensor | None, act: str) -> str | None:
    """Why the kernels cannot run these tokens and weights, as the end of a sentence; None where they can."""
    if G is not None:
        return "has no gated steps, which make no lock: 'auto' runs them in plain torch"
    if not x.is_cuda:
        return f"wants tensors on a CUDA or ROCm device, not on {x.device}"
    if act not in KERNEL_ACTS:
        return f"has no activation {act!r}; it has {', '.join(sorted(KERNEL_ACTS))}"
    if A.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no weights of {A.dtype}"
    return None


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
    if gram is not None and G is not None:
        raise ValueError("a gated chain has no Gram blocks")
    if gram is not None:
        check_gram(gram, A)
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
_library.impl("dlr_net", _run, "CompositeExplicitAutograd")  # every device
_library.impl("dlr_net", _autograd, "Autograd")
torch.library.register_fake("dlr_lock::dlr_net", _fake, lib=_library)
