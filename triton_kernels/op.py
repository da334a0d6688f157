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
from .chain import ChainWeights
from .cost import gram_width
from .lookahead import check_gram, gram_blocks, run_blocks, without_autocast
from .native import MOST_TOKENS, native_reason, run_native
from .plain import run_plain
from .reference import chain_reference, run_steps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights that the kernels take
_SCHEMA = (
    "dlr_net(Tensor x, Tensor A, Tensor B, Tensor scale, Tensor bias, Tensor? G, str act, Tensor? gram, "
    "str backend) -> Tensor"
)


def dlr_net(x: Tensor, chain: ChainWeights, gram: Tensor | None = None) -> Tensor:
    """The output of a DLR-Net by the current backend (see `backend`); inference only, but for 'naive'.

    A gated chain runs by its definition whatever the backend: gated steps make no lock, so nothing faster is kept for
    them.

    Args:
        x: The tokens, [..., d], of any float dtype.
        chain: The weights.
        gram: What `gram_blocks` gave for these weights; where they are wanted (`wants_gram`) computed in every call if
            None, and None for a gated chain.

    Returns:
        y, of x's shape and dtype.

    Raises:
        ValueError: The weights do not form a chain, x or `gram` does not fit it, or the backend, 'triton' or 'native',
            cannot run it.
        RuntimeError: A gradient would be wanted.
    """
    backend = current_backend()
    if backend == "naive":
        return chain_reference(x, chain)
    A, B, scale, bias, G, act = chain  # flat, as an op's schema is
    return torch.ops.dlr_lock.dlr_net(x, A, B, scale, bias, G, act, gram, backend)


def wants_gram(x: Tensor) -> bool:
    """Whether a chain of plain steps on x's device reads Gram blocks by the current backend."""
    backend = current_backend()
    return backend == "lookahead" or (x.is_cuda and backend in ("auto", "triton"))


def compile_native(chain: ChainWeights) -> None:
    """Builds what the current backend runs few tokens by on a CPU, if the chain lies there and nobody has built it."""
    if current_backend() in ("auto", "native"):
        native_reason(chain.A, chain)  # which looks for the function last, and makes it


def unsupported_reason(x: Tensor, chain: ChainWeights) -> str | None:
    """Why the Triton kernels cannot run a chain on x's device, as the end of a sentence; None where they can."""
    return chain.refused(x, "a CUDA or ROCm device", x.is_cuda, KERNEL_ACTS, DTYPES)


def _run(
    x: Tensor, A: Tensor, B: Tensor, scale: Tensor, bias: Tensor, G: Tensor | None, act: str,
    gram: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    return run_chain(x, ChainWeights(A, B, scale, bias, G, act), gram, backend)


def run_chain(x: Tensor, chain: ChainWeights, gram: Tensor | None, backend: str) -> Tensor:
    """`dlr_net` by a backend that is not 'naive', of tensors that no gradient is wanted of."""
    _check(x, chain, gram)
    reason = unsupported_reason(x, chain) if x.is_cuda or backend == "triton" else None
    if reason and backend == "triton":
        raise ValueError(f"backend 'triton' {reason}")
    few = x.device.type == "cpu" and 0 < x.numel() <= MOST_TOKENS * x.shape[-1]
    native = backend == "native" or (few and backend == "auto")
    lacking = native_reason(x, chain) if native else None
    if lacking and backend == "native":
        raise ValueError(f"backend 'native' {lacking}")
    # Triton launches on the current device, whatever the tensors'.
    device = torch.cuda.device(x.device) if x.is_cuda else nullcontext()
    with device, without_autocast(x.device.type):
        if chain.G is not None:
            return run_steps(x, chain)
        if native and not lacking:
            return run_native(x, chain)
        if backend == "plain" or (backend == "auto" and not x.is_cuda):
            return run_plain(x, chain)
        if gram is None:
            gram = gram_blocks(chain.A, chain.B, block=gram_width(chain.A))
        if reason or backend == "lookahead":
            return run_blocks(x, chain, gram)
        # Imported at the first use: Triton is Linux only, and takes half a second.
        from .dispatch import run

        return run(x.reshape(-1, x.shape[-1]), chain, gram).reshape(x.shape)


def _check(x: Tensor, chain: ChainWeights, gram: Tensor | None) -> None:
    """Raises ValueError on what the kernels would read or write out of bounds, or as something else."""
    chain.check(x)
    if gram is not None:
        if chain.G is not None:
            raise ValueError("a gated chain has no Gram blocks")
        check_gram(gram, chain.A)
    _check_devices(x, chain.scale, chain.bias, *chain.weights, gram)


def _check_devices(*tensors: Tensor | None) -> None:
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"a chain on several devices: {', '.join(sorted(map(str, devices)))}")


def _fake(
    x: Tensor, A: Tensor, B: Tensor, scale: Tensor, bias: Tensor, G: Tensor | None, act: str,
    gram: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    # Sizes may be symbols here: the real kernels look at the rest.
    _check_devices(x, scale, bias, A, B, G, gram)
    torch._check(
        x.shape[-1] == A.shape[-1], lambda: f"{x.shape[-1]} features do not fit a chain of {A.shape[-1]}"
    )
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _autograd(*args: Tensor | str | None) -> Tensor:
    refuse_gradients(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.dlr_lock.dlr_net(*args)


def refuse_gradients(*args: Tensor | str | None) -> None:
    """Raises RuntimeError where a gradient would be wanted of an op's arguments."""
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


library = torch.library.Library("dlr_lock", "DEF")
library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
library.impl("dlr_net", _run, "CompositeExplicitAutograd")  # every device
library.impl("dlr_net", _autograd, "Autograd")
torch.library.register_fake("dlr_lock::dlr_net", _fake, lib=library)
