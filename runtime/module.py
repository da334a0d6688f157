"""The module that stands where an MLP stood."""

import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..triton_kernels import (
    ChainWeights,
    compile_native,
    current_backend,
    dlr_net,
    gram_blocks,
    gram_width,
    wants_gram,
)
from .spec import DLRSpec


class ChainModule(nn.Module):
    """What the modules of chains have in common: parameters that tensors are assigned to, and vectors in float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        vectors = {name: getattr(self, name).data for name in ("dlr_scale", "dlr_bias")}
        super()._apply(fn, recurse)
        for name, vector in vectors.items():  # float32 whatever the rest becomes
            parameter = getattr(self, name)
            if parameter.dtype != torch.float32:
                parameter.data = vector.to(parameter.device)
        return self

    @torch.no_grad()
    def assign(self, tensors: dict[str, Tensor]) -> None:
        """Copies tensors (names as the parameters') into the module.

        Raises KeyError where one is missing, ValueError where one has another shape.
        """
        for name, parameter in self.named_parameters():
            if tensors[name].shape != parameter.shape:
                raise ValueError(f"{name} is {list(tensors[name].shape)}, not {list(parameter.shape)}")
        for name, parameter in self.named_parameters():
            parameter.copy_(tensors[name])


class DLRNet(ChainModule):
    """A DLR-Net: [..., d] -> [..., d], for any leading shape, in the input's dtype.

    The weights dlr_A, dlr_B and, for gated steps, dlr_G are [L, K, r, d] in `dtype` (torch's default dtype
    if None); dlr_scale and dlr_bias are [d] in float32, whatever the dtype of the rest, for they carry the
    unit-RMS scaling of the distillation. A new module is the zero function: fill it with `assign`.
    """

    dlr_A: nn.Parameter
    dlr_B: nn.Parameter
    dlr_G: nn.Parameter | None
    dlr_scale: nn.Parameter
    dlr_bias: nn.Parameter

    def __init__(
        self, spec: DLRSpec, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        shape, d = spec.weight_shape, spec.hidden_size
        for name in self.weight_names(spec):
            weight = torch.zeros(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        if not spec.gated:
            self.register_parameter("dlr_G", None)
        for name in ("dlr_scale", "dlr_bias"):
            vector = torch.zeros(d, dtype=torch.float32, device=device)
            self.register_parameter(name, nn.Parameter(vector, requires_grad=False))
        self.dlr_gram: Tensor | None
        self.register_buffer("dlr_gram", None, persistent=False)
        self._prepared: list[tuple[weakref.ref[Tensor], tuple[int, int]]] = []
        self.register_load_state_dict_post_hook(_prepare_again)

    @staticmethod
    def weight_names(spec: DLRSpec) -> tuple[str, ...]:
        """The names of the [L, K, r, d] weights."""
        return ("dlr_A", "dlr_B", "dlr_G") if spec.gated else ("dlr_A", "dlr_B")

    @property
    def chain(self) -> ChainWeights:
        """The weights as the functions of `triton_kernels` take them: the parameters themselves, no copies."""
        return ChainWeights(self.dlr_A, self.dlr_B, self.dlr_scale, self.dlr_bias, self.dlr_G, self.spec.act)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d] -> y: [..., d], in x's dtype, by the current backend of `triton_kernels.backend`."""
        chain, gram = self.chain, None
        if current_backend() == "naive":
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self.dlr_gram = None  # training follows, and fused optimizers do not count their writes
        else:
            gram = self._current_gram(chain.weights)
        return dlr_net(x, chain, gram)

    @torch.no_grad()
    def prepare(self) -> None:
        """Does what the first call would wait for: Gram blocks, which look-ahead wants, for the weights and the device
        as they now are, and compiling what runs few tokens on a CPU. Gated steps, which run by their definition, have
        neither, and a CPU has no Gram blocks, but for the backend 'lookahead'.

        The first forward does it where nobody did, and does it again where the weights were replaced, loaded,
        moved or trained. What goes past torch, such as writing through `.data`, it cannot see: call this then.
        """
        self.dlr_gram = None
        if self.dlr_A.is_meta or self.spec.gated:
            return
        compile_native(self.chain)
        if wants_gram(self.dlr_A):
            self.dlr_gram = gram_blocks(self.dlr_A, self.dlr_B, block=gram_width(self.dlr_A))
        self._prepared = [(weakref.ref(w), _writes(w)) for w in self.chain.weights]

    def _current_gram(self, weights: tuple[Tensor, ...]) -> Tensor | None:
        if self.spec.gated or not wants_gram(self.dlr_A):
            return None
        if torch.compiler.is_compiling():  # cannot be traced; what is compiled is inference
            return self.dlr_gram
        seen = [(id(ref()), count) for ref, count in self._prepared]
        if (
            any(w.requires_grad for w in weights)
            or self.dlr_gram is None
            or seen != [(id(w), _writes(w)) for w in weights]
        ):
            if self.dlr_A.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("call a DLRNet, or its prepare(), before it is captured in a CUDA graph")
            self.prepare()
        return self.dlr_gram

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DLRNet":
        # Prepared on a CPU, too, where that makes no blocks: what is compiled after a move computes none by itself.
        prepared, self.dlr_gram = self.dlr_gram is not None or bool(self._prepared), None
        super()._apply(fn, recurse)
        if prepared:
            self.prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_prepared": [],
        }  # a copy has weights of its own, and references cannot be pickled

    def extra_repr(self) -> str:
        # PEFT's refusal of a module that its adapters do not fit shows the module, so that this is its reason.
        return f"d={self.spec.hidden_size}, {self.spec}; no linear layer is in it, and adapters fit linear layers alone"


def _writes(w: Tensor) -> tuple[int, int]:
    """Where a tensor's data are, and torch's count of the writes to it, which those of inference_mode lack."""
    return w.data_ptr(), -1 if w.is_inference() else w._version


def _prepare_again(net: DLRNet, incompatible: object) -> None:
    if net.dlr_gram is not None:
        net.prepare()
