"""The chains of a mixture of experts, one an expert, as one op: `torch.ops.dlr_lock.dlr_experts`.

For an expert e and the tokens that are routed to it:

    y = scale[e] * (z[K] - x) + bias[e],    z[0] = x,    z[k+1] = z[k] + act(z[k] A[e,k]^T) B[e,k]

Tokens come sorted by expert, with the offsets at which each expert's end, as grouped products take them. The definition
is a loop over experts (`experts_reference`); a GPU runs all in one launch (`experts_kernel.py`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .activations import ACTIVATIONS, KERNEL_ACTS
from .backend import current_backend
from .chain import ChainWeights
from .op import DTYPES, library, refuse_gradients, run_chain
from .reference import chain_reference


class ExpertChains(NamedTuple):
    """The weights of E chains of K steps of rank r on d features, and their activation.

    Attributes:
        A, B: What the steps read and write, [E, K, r, d] each, of one float dtype.
        scale, bias: Of the outputs, [E, d] each, float32 for the kernels.
        act: One of ACTIVATIONS.
    """

    A: Tensor
    B: Tensor
    scale: Tensor
    bias: Tensor
    act: str = "silu"

    def chain(self, expert: int) -> ChainWeights:
        """One expert's chain, views of the same weights."""
        parts = (part[expert] for part in self[:4])
        A, B, scale, bias = parts
        return ChainWeights(A[None], B[None], scale, bias, act=self.act)

    def check(self, x: Tensor, ends: Tensor) -> None:
        """Checks that the weights form chains, and that x [S, d] are tokens for them, grouped by `ends`.

        Raises:
            ValueError: They do not; the message names the shapes, the dtypes or the activation.
        """
        A = self.A
        if self.act not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.act!r}; one of {', '.join(sorted(ACTIVATIONS))}")
        if A.dim() != 4 or 0 in A.shape or self.B.shape != A.shape or self.B.dtype != A.dtype:
            raise ValueError(
                f"A and B must share one shape [E, K, r, d], not {[*A.shape]} and {[*self.B.shape]}"
            )
        vectors = (A.shape[0], A.shape[-1])
        if not self.scale.shape == self.bias.shape == vectors:
            raise ValueError(
                f"scale and bias must be {[*vectors]}, not {[*self.scale.shape]}, {[*self.bias.shape]}"
            )
        if x.dim() != 2 or x.shape[-1] != A.shape[-1] or not x.dtype.is_floating_point:
            raise ValueError(f"float tokens [S, {A.shape[-1]}] are wanted, not {x.dtype} {[*x.shape]}")
        if ends.shape != A.shape[:1] or ends.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"ends must be {A.shape[0]} whole numbers, not {ends.dtype} {[*ends.shape]}")


def grouped(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """How rows are sorted by expert.

    Args:
        index: [S] int64, the expert of each row; `experts` or more for none.
        experts: E.

    Returns:
        The rows in the order of their experts, [S] int64, those of none last; where each expert's end, [E] int32.
        Nothing waits for the device.
    """
    ranked, order = index.sort(stable=True)
    every = torch.arange(experts, device=index.device, dtype=index.dtype)
    return order, torch.searchsorted(ranked, every, right=True).int()


def experts_reference(x: Tensor, ends: Tensor, chains: ExpertChains) -> Tensor:
    """The outputs of experts' chains, by their definition; differentiable.

    Args:
        x: The tokens, [S, d], of any float dtype, sorted by expert.
        ends: [E] whole numbers: expert e has the rows from ends[e - 1] (0 for the first) to ends[e].
        chains: The weights.

    Returns:
        y, of x's shape and dtype; zero for rows behind the last expert's.

    Raises:
        ValueError: The weights do not form chains, or x or `ends` does not fit them.
    """
    chains.check(x, ends)
    every = [partial(chain_reference, chain=chains.chain(expert)) for expert in range(len(ends))]
    return one_by_one(x, ends, every)


def one_by_one(x: Tensor, ends: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """What functions make of their tokens, as `experts_reference` does it of chains.

    Args:
        x, ends: As there.
        experts: Of each expert, [n, d] -> [n, d]; not called for an expert without tokens.
    """
    parts, begin = [], 0
    for expert, end in zip(experts, ends.tolist(), strict=True):
        if end > begin:
            parts.append(expert(x[begin:end]))
        begin = max(begin, end)
    return torch.cat([*parts, torch.zeros_like(x[begin:])])


def dlr_experts(x: Tensor, ends: Tensor, chains: ExpertChains) -> Tensor:
    """`experts_reference` by the current backend (see `backend`); inference only, but for 'naive'.

    Raises:
        ValueError: As there, and where the backend, 'triton' or 'native', cannot run it.
        RuntimeError: A gradient would be wanted.
    """
    backend = current_backend()
    if backend == "naive":
        return experts_reference(x, ends, chains)
    A, B, scale, bias, act = chains
    return torch.ops.dlr_lock.dlr_experts(x, ends, A, B, scale, bias, act, backend)


def _run(
    x: Tensor, ends: Tensor, A: Tensor, B: Tensor, scale: Tensor, bias: Tensor, act: str, backend: str
) -> Tensor:
    chains = ExpertChains(A, B, scale, bias, act)
    chains.check(x, ends)
    if backend in ("auto", "triton") and (x.is_cuda or backend == "triton"):
        reason = _refused(x, chains)
        if reason is None:
            # Imported at the first use: Triton is Linux only, and takes half a second.
            from .experts_kernel import run_experts

            with torch.cuda.device(x.device):
                return run_experts(x, ends, chains)
        if backend == "triton":
            raise ValueError(f"backend 'triton' {reason}")
    y, begin = torch.zeros_like(x, memory_format=torch.contiguous_format), 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            # a GPU without kernels for these chains goes step by step
            form = "plain" if x.is_cuda and backend == "auto" else backend
            y[begin:end] = run_chain(x[begin:end], chains.chain(expert), None, form)
        begin = max(begin, end)
    return y


def _refused(x: Tensor, chains: ExpertChains) -> str | None:
    """Why the kernel cannot run chains on x's device, as the end of a sentence; None where it can."""
    return chains.chain(0).refused(x, "a CUDA or ROCm device", x.is_cuda, KERNEL_ACTS, DTYPES)


def _fake(
    x: Tensor, ends: Tensor, A: Tensor, B: Tensor, scale: Tensor, bias: Tensor, act: str, backend: str
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _autograd(*args: Tensor | str) -> Tensor:
    refuse_gradients(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.dlr_lock.dlr_experts(*args)


library.define(
    "dlr_experts(Tensor x, Tensor ends, Tensor A, Tensor B, Tensor scale, Tensor bias, str act, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl("dlr_experts", _run, "CompositeExplicitAutograd")  # every device
library.impl("dlr_experts", _autograd, "Autograd")
torch.library.register_fake("dlr_lock::dlr_experts", _fake, lib=library)
