"""The weights of a DLR-Net, which travel together."""

from collections.abc import Collection
from typing import Any, NamedTuple

from torch import Tensor, dtype

from .activations import ACTIVATIONS


class ChainWeights(NamedTuple):
    """The weights and the activation of a DLR-Net of L lanes of K steps of rank r on d features.

    Attributes:
        A: What the steps read of the state, [L, K, r, d].
        B: What they write to it, [L, K, r, d], of A's dtype: any float dtype.
        scale: Of the lanes' summed updates in the output, [d], float32 for the kernels.
        bias: Of the output, [d], float32 for the kernels.
        G: What gated steps read beside A, of A's shape and dtype; None for plain steps.
        act: The activation, one of ACTIVATIONS.
    """

    A: Tensor
    B: Tensor
    scale: Tensor
    bias: Tensor
    G: Tensor | None = None
    act: str = "silu"

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """A, B and, of gated steps, G: the tensors [L, K, r, d]."""
        return (self.A, self.B) if self.G is None else (self.A, self.B, self.G)

    def to(self, *args: Any, **kwargs: Any) -> "ChainWeights":
        """The chain with every tensor, scale and bias too, moved as by `torch.Tensor.to` with the same arguments."""
        A, B, scale, bias = (t.to(*args, **kwargs) for t in self[:4])
        G = None if self.G is None else self.G.to(*args, **kwargs)
        return ChainWeights(A, B, scale, bias, G, self.act)

    def in_products(self, products: dtype) -> "ChainWeights":
        """The chain with A, B and G in a dtype that is multiplied in, scale and bias as they are; differentiable."""
        G = None if self.G is None else self.G.to(products)
        return self._replace(A=self.A.to(products), B=self.B.to(products), G=G)

    def refused(
        self, x: Tensor, place: str, there: bool, acts: Collection[str], dtypes: Collection[dtype]
    ) -> str | None:
        """Why a fast form of plain steps cannot run the chain on x, as the end of a sentence; None where it can.

        Args:
            x: The tokens.
            place: Where that form wants its tensors, in words.
            there: Whether x is there.
            acts: The activations that it has.
            dtypes: The dtypes of weights that it has.
        """
        if self.G is not None:
            return "has no gated steps, which make no lock: 'auto' runs them in plain torch"
        if not there:
            return f"wants tensors on {place}, not on {x.device}"
        if self.act not in acts:
            return f"has no activation {self.act!r}; it has {', '.join(sorted(acts))}"
        if self.A.dtype not in dtypes:
            return f"has no weights of {self.A.dtype}"
        return None

    def check(self, x: Tensor) -> None:
        """Checks that the weights form a chain, and that x [..., d] are tokens for it.

        Raises:
            ValueError: They do not; the message names the shapes, the dtypes or the activation.
        """
        A = self.A
        for name, part in zip(self._fields, self[:4], strict=False):
            if not isinstance(part, Tensor):
                raise ValueError(f"{name} of a chain must be a tensor, not {type(part).__name__}")
        if self.act not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.act!r}; one of {', '.join(sorted(ACTIVATIONS))}")
        shapes = [tuple(w.shape) for w in self.weights]
        if A.dim() != 4 or len(set(shapes)) != 1:
            raise ValueError(f"A, B and G must share one shape [L, K, r, d], not {shapes}")
        dtypes = {w.dtype for w in self.weights}
        if not x.dtype.is_floating_point or len(dtypes) > 1 or not A.dtype.is_floating_point:
            raise ValueError(
                f"a chain wants float tokens and weights of one float dtype, not {x.dtype} and {dtypes}"
            )
        if 0 in A.shape:
            raise ValueError(f"a chain of shape {list(A.shape)} has no weights")
        if x.dim() == 0:
            raise ValueError(f"one number does not fit a chain of {A.shape[-1]} features")
        if x.shape[-1] != A.shape[-1]:
            raise ValueError(f"tokens of {x.shape[-1]} features do not fit a chain of {A.shape[-1]}")
        if not self.scale.shape == self.bias.shape == A.shape[-1:]:
            raise ValueError(
                f"scale and bias must be [{A.shape[-1]}], not {list(self.scale.shape)}, {list(self.bias.shape)}"
            )
