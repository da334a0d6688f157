"""The module that stands where an MLP stood."""

import torch
from torch import Tensor, nn

from ..triton_kernels import chain_reference
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

    @staticmethod
    def weight_names(spec: DLRSpec) -> tuple[str, ...]:
        """The names of the [L, K, r, d] weights."""
        return ("dlr_A", "dlr_B", "dlr_G") if spec.gated else ("dlr_A", "dlr_B")

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d] -> y: [..., d], in x's dtype."""
        return chain_reference(
            x, self.dlr_A, self.dlr_B, self.dlr_scale, self.dlr_bias, self.dlr_G, self.spec.act
        )

    @torch.no_grad()
    def assign(self, tensors: dict[str, Tensor]) -> None:
        """Copies tensors (names as the parameters') into the module; raises KeyError where one is missing."""
        for name, parameter in self.named_parameters():
            parameter.copy_(tensors[name])

    def extra_repr(self) -> str:
        return f"d={self.spec.hidden_size}, {self.spec}"
