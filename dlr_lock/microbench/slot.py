"""What fills one MLP slot in a benchmark: the dense MLP, the plain chain and the chain's fast forms, on one x.

Data are random: x of unit RMS, updates of about half of it. Each MLP comes in several copies, which calls rotate
over.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from ..common.dtypes import DTYPES
from ..common.errors import DLRError
from ..common.options import known_name
from ..runtime.spec import DLRSpec
from ..triton_kernels import (
    ChainWeights,
    backend,
    chain_reference,
    dlr_net,
    gram_blocks,
    gram_width,
    lookahead,
)
from ..triton_kernels.decode_plan import plan_decode
from ..triton_kernels.gpu import device_constants
from ..triton_kernels.rounds import Shape
from .timing import Call

# Each family in the forms that it is timed in; "ours" is the op as a model runs it: on a GPU by the Triton kernels, as
# the cost model steers them, whose two paths are "prefill" and "decode"; on a CPU natively or in plain torch.
PROVIDERS = (
    "dense-eager", "dense-compiled", "dense-graph", "naive-eager", "naive-compiled", "naive-graph",
    "lookahead-eager", "ours-eager", "ours-graph", "prefill-graph", "decode-graph",
)  # fmt: skip
CPU_PROVIDERS = ("dense-eager", "naive-eager", "lookahead-eager", "ours-eager")


@dataclass(frozen=True, slots=True)
class Case:
    """A gated MLP of width `intermediate`, the chain in its place, and a number of tokens."""

    spec: DLRSpec
    intermediate: int
    tokens: int

    @property
    def dense_params(self) -> int:
        return 3 * self.spec.hidden_size * self.intermediate

    def shape(self, dtype: torch.dtype) -> Shape:
        """The chain on these tokens, as the cost model counts it."""
        return Shape(*self.spec.weight_shape, self.tokens, dtype.itemsize)


class DenseWeights(NamedTuple):
    """The weights of a SwiGLU MLP: gate and up [f, d], down [d, f]."""

    gate: Tensor
    up: Tensor
    down: Tensor


def dense_mlp(x: Tensor, weights: DenseWeights) -> Tensor:
    """The SwiGLU MLP on x [..., d]: [..., d]."""
    gate, up, down = weights
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def ours(x: Tensor, **call: Any) -> Tensor:
    """The op, arguments as `dlr_net`'s; on a GPU by its Triton kernels or not at all."""
    with backend("triton" if x.is_cuda else "auto"):
        return dlr_net(x, **call)


def dtype_of(name: str, *, gpu: bool) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 on a GPU and float32 on a CPU. Raises DLRError on another name."""
    name = known_name(name, ("auto", *DTYPES), "dtype")
    if name == "auto":
        return torch.bfloat16 if gpu else torch.float32
    return DTYPES[name]


class Slot:
    """The tensors of a case: x, and copies of both MLPs' weights of `cold_bytes` at least."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, cold_bytes: float) -> None:
        if case.spec.gated:
            raise DLRError("a slot is of plain steps: gated ones have no fast form to compare")
        self.case, self.device, self.dtype = case, device, dtype
        d, f = case.spec.hidden_size, case.intermediate
        _, depth, rank, _ = shape = case.spec.weight_shape
        source = torch.Generator(device).manual_seed(0)

        def normal(*size: int, over: int = 1) -> Tensor:
            values = torch.randn(size, generator=source, device=device)
            return values.mul_(over**-0.5).to(dtype)

        self.x = normal(case.tokens, d)
        gate, up, down = normal(f, d, over=d), normal(f, d, over=d), normal(d, f, over=f)
        copies = _copies({"gate": gate, "up": up, "down": down}, cold_bytes)
        self.dense = [DenseWeights(**copy) for copy in copies]
        chain = {"A": normal(*shape, over=d), "B": normal(*shape, over=depth * rank)}
        chain |= {name: torch.rand(d, generator=source, device=device) for name in ("scale", "bias")}
        self.chain = [ChainWeights(**copy, act=case.spec.act) for copy in _copies(chain, cold_bytes)]
        width = gram_width(self.chain[0].A)
        self.gram = [gram_blocks(w.A, w.B, block=width) for w in self.chain]

    def call(self, provider: str) -> tuple[Call, int] | None:
        """How to call a provider, and on how many copies; None where the case has no such form."""
        family, mode = provider.split("-")
        if (form := self._form(family)) is None:
            return None
        forward, arguments = form
        if mode == "compiled":
            forward = torch.compile(forward, dynamic=False, fullgraph=True)
        return (lambda i: forward(x=self.x, **arguments[i])), len(arguments)

    def _form(self, family: str) -> tuple[Callable[..., Tensor], list[dict[str, Any]]] | None:
        """The function of a family, and what it takes beside x for each copy."""
        if family == "dense":
            return dense_mlp, [{"weights": weights} for weights in self.dense]
        chains: list[dict[str, Any]] = [{"chain": chain} for chain in self.chain]
        if family == "naive":
            return chain_reference, chains
        if family == "ours" and self.device.type == "cpu":  # where a model's chains have no Gram blocks
            return ours, chains
        with_gram = [of | {"gram": gram} for of, gram in zip(chains, self.gram, strict=True)]
        if family in ("lookahead", "ours"):
            return (lookahead if family == "lookahead" else ours), with_gram
        # One of the two paths of the kernels, past the cost model, where it has both to choose from.
        device = device_constants(self.device.index)
        plan = plan_decode(self.case.shape(self.dtype), device)
        if plan is None:
            return None
        from ..triton_kernels.decode import decode
        from ..triton_kernels.prefill import prefill

        if family == "prefill":
            return prefill, [of | {"device": device} for of in with_gram]
        return decode, [of | {"plan": plan} for of in chains]


def _copies(weights: dict[str, Tensor], wanted: float) -> list[dict[str, Tensor]]:
    size = sum(w.nbytes for w in weights.values())
    more = max(1, math.ceil(wanted / size)) - 1
    return [weights] + [{name: w.clone() for name, w in weights.items()} for _ in range(more)]
