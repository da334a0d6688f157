"""The module that stands where an MLP stood."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..triton_kernels import current_backend, dlr_net, gram_blocks, gram_width
from .spec import DLRSpec


class DLRNet(nn.Module):
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
        self._prepared: list[int] = []

    @staticmethod
    def weight_names(spec: DLRSpec) -> tuple[str, ...]:
        """The names of the [L, K, r, d] weights."""
        return ("dlr_A", "dlr_B", "dlr_G") if spec.gated else ("dlr_A", "dlr_B")

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d] -> y: [..., d], in x's dtype, by the current backend of `triton_kernels.backend`."""
        gram = None if current_backend() == "naive" else self._current_gram()
        return dlr_net(
            x, self.dlr_A, self.dlr_B, self.dlr_scale, self.dlr_bias, self.dlr_G, self.spec.act, gram
        )

    @torch.no_grad()
    def prepare(self) -> None:
        """Computes the Gram blocks that look-ahead wants, for the weights and the device as they now are.

        The first forward does it where nobody did; a module that moves to another device or dtype does it again.
        """
        weights = self._weights()
        if self.dlr_A.is_meta:
            self.dlr_gram = None
            return
        width = gram_width(self.spec.weight_shape, self.spec.gated, self.dlr_A.itemsize, self.dlr_A.device)
        self.dlr_gram = gram_blocks(self.dlr_A, self.dlr_B, self.dlr_G, block=width)
        self._prepared = [w._version for w in weights]

    def _current_gram(self) -> Tensor | None:
        # Weights that were written to since (by an optimizer, by a load) have other Gram blocks. A compiler cannot
        # trace the counters; what it compiles is inference, and was warmed up.
        if not torch.compiler.is_compiling() and (
            self.dlr_gram is None or self._prepared != [w._version for w in self._weights()]
        ):
            self.prepare()
        return self.dlr_gram

    def _weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.weight_names(self.spec)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DLRNet":
        prepared, self.dlr_gram = self.dlr_gram is not None, None
        super()._apply(fn, recurse)
        if prepared:
            self.prepare()
        return self

    @torch.no_grad()
    def assign(self, tensors: dict[str, Tensor]) -> None:
        """Copies tensors (names as the parameters') into the module; raises KeyError where one is missing."""
        for name, parameter in self.named_parameters():
            parameter.copy_(tensors[name])

    def extra_repr(self) -> str:
        return f"d={self.spec.hidden_size}, {self.spec}"
