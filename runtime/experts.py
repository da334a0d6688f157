"""What stands where the experts of a mixture stood: a chain for each, all in one call; the router stays as it is."""

import copy
import inspect
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import DLRError
from ..triton_kernels import ExpertChains, dlr_experts, grouped
from .module import ChainModule, DLRNet
from .spec import DLRSpec


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """The shape of a mixture's chains.

    Attributes:
        chain: Of every expert's chain: one lane, and no gates.
        experts: How many the mixture has, E.
        kept: Experts that stay as they are, without a chain, ascending.

    Raises:
        DLRError: Where a value makes no mixture.
    """

    chain: DLRSpec
    experts: int
    kept: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.chain.lanes != 1 or self.chain.gated:
            raise DLRError("an expert's chain has one lane, and no gates")
        if not isinstance(self.experts, int) or isinstance(self.experts, bool) or self.experts < 1:
            raise DLRError(f"experts must be a whole number of at least 1, not {self.experts!r}")
        named = list(self.kept)
        if named != sorted(set(named)) or not all(
            isinstance(e, int) and 0 <= e < self.experts for e in named
        ):
            raise DLRError(
                f"experts that stay as they are must be ascending numbers below {self.experts}, not {named}"
            )
        if len(named) == self.experts:
            raise DLRError("a mixture all of whose experts stay as they are has no chains")

    @property
    def chained(self) -> tuple[int, ...]:
        """The experts that have chains, ascending."""
        return tuple(e for e in range(self.experts) if e not in set(self.kept))

    @property
    def act(self) -> str:
        """The chains' activation."""
        return self.chain.act

    @property
    def params(self) -> int:
        """Parameters of all chains; what is kept is the original's."""
        return len(self.chained) * self.chain.params

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in config.json."""
        return {**asdict(self.chain), "experts": self.experts, "kept": list(self.kept)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ExpertsSpec":
        """The inverse of `to_dict`; raises DLRError on missing or unknown fields."""
        chain = dict(values)
        if not isinstance(kept := chain.pop("kept", None), list) or "experts" not in chain:
            raise DLRError("a mixture's description must have the fields of a chain's, experts and kept")
        experts = chain.pop("experts")
        return cls(DLRSpec.from_dict(chain), experts, tuple(kept))

    def __str__(self) -> str:
        kept = f", {len(self.kept)} kept" if self.kept else ""
        return f"{len(self.chained)} of {self.chain}{kept}"


def spec_from(values: dict[str, Any]) -> DLRSpec | ExpertsSpec:
    """The shape of an MLP's chain or of a mixture's, from plain values; raises DLRError where they are neither's."""
    return (ExpertsSpec if "experts" in values else DLRSpec).from_dict(values)


class Routed(nn.Module):
    """What is called as the experts of transformers are, where `grouped` says what becomes of each expert's tokens.

    Args:
        spec: Which experts there are, and which stay as they are.
        kept: Those that stay, in ascending order, as transformers has them; None where none does.
    """

    def __init__(self, spec: ExpertsSpec, kept: nn.Module | None) -> None:
        super().__init__()
        self.spec = spec
        self.dlr_kept = kept
        self._places: Tensor | None = None

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [S, d], the tokens sorted by expert among those that have chains, of which each one's end at `ends` [E'] ->
        [S, d]; zero for rows behind the last one's."""
        raise NotImplementedError

    def forward(self, hidden: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """What the experts give together, in hidden's dtype.

        Args:
            hidden: [T, d], the tokens; without a routing [E T, d], those of each expert one after the other, as
                Llama 4 gives them, where a row of zeros is a token that is not routed there.
            routing: The experts of each token, [T, k] int64, a number beyond the last for none; what their outputs are
                multiplied with, [T, k].
            named: The same by name, in this order.

        Returns:
            [T, d], summed over a token's experts; without a routing [E T, d].
        """
        given = [part for part in (*routing, *named.values()) if part is not None]
        if not given:
            rows = hidden.shape[0] // self.spec.experts
            every = torch.arange(self.spec.experts, device=hidden.device).repeat_interleave(rows)
            return self._each(hidden, torch.where((hidden != 0).any(-1), every, self.spec.experts))
        index, weights = given
        tokens, k = index.shape
        each = self._each(hidden, index.reshape(-1), k).view(tokens, k, -1)
        return (each.float() * weights[..., None].float()).sum(1).to(hidden.dtype)

    def _each(self, hidden: Tensor, index: Tensor, k: int = 1) -> Tensor:
        """The output of expert index[i] for token i // k: hidden [T, d], index [T k] -> [T k, d]."""
        place = self._place_of(index)
        order, ends = grouped(place, len(self.spec.chained))
        sorted_ = self.grouped(hidden[order // k], ends)
        # back by a gather, not by a scatter in place, so that the definition stays differentiable
        each = sorted_[order.argsort()]
        if self.dlr_kept is not None:
            each = each + self._kept(hidden, index, k)
        return each

    def _kept(self, hidden: Tensor, index: Tensor, k: int) -> Tensor:
        """The same for experts that stay as they are, zero for the others."""
        assert self.dlr_kept is not None
        out = torch.zeros(len(index), hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
        for place, expert in enumerate(self.spec.kept):
            rows = (index == expert).nonzero()[:, 0]
            if len(rows):
                out[rows] = one_expert(self.dlr_kept, place, hidden[rows // k])
        return out

    def _place_of(self, index: Tensor) -> Tensor:
        """Which of the chains is an expert's; their number for an expert that has none."""
        if not self.spec.kept:
            return index
        count = len(self.spec.chained)
        if self._places is None or self._places.device != index.device:
            places = torch.full((self.spec.experts + 1,), count)
            places[list(self.spec.chained)] = torch.arange(count)
            self._places = places.to(index.device)
        return self._places[index.clamp(max=self.spec.experts)]


class DLRExperts(ChainModule, Routed):
    """The chains of a mixture's experts, called as the experts of transformers are.

    The weights dlr_A and dlr_B are [E', K, r, d] in `dtype` (torch's default dtype if None), E' being the experts that
    have chains; dlr_scale and dlr_bias are [E', d] in float32. A new module is the zero function: fill it with
    `assign`.

    Args:
        spec: The shapes.
        stock: The experts whose place it takes, of which it keeps copies of those that have no chain; None where all
            have one.
    """

    dlr_A: nn.Parameter
    dlr_B: nn.Parameter
    dlr_scale: nn.Parameter
    dlr_bias: nn.Parameter

    def __init__(
        self,
        spec: ExpertsSpec,
        stock: nn.Module | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if spec.kept and stock is None:
            raise DLRError("experts that stay as they are must be given")
        super().__init__(spec, _some(stock, spec, dtype) if spec.kept and stock is not None else None)
        count, (_, depth, rank, d) = len(spec.chained), spec.chain.weight_shape
        for name in ("dlr_A", "dlr_B"):
            weight = torch.zeros(count, depth, rank, d, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        for name in ("dlr_scale", "dlr_bias"):
            vector = torch.zeros(count, d, dtype=torch.float32, device=device)
            self.register_parameter(name, nn.Parameter(vector, requires_grad=False))

    @property
    def chains(self) -> ExpertChains:
        """The weights as the functions of `triton_kernels` take them: the parameters themselves, no copies."""
        return ExpertChains(self.dlr_A, self.dlr_B, self.dlr_scale, self.dlr_bias, self.spec.act)

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """All chains in one call, by the current backend."""
        return dlr_experts(x, ends, self.chains)

    def net(self, expert: int) -> DLRNet:
        """The chain of one expert, by its number among all, as a module of its own: its parameters are views of these.

        Raises:
            ValueError: Where the expert has none.
        """
        place = self.spec.chained.index(expert)
        net = DLRNet(self.spec.chain, device="meta")
        for name, whole in self.named_parameters(recurse=False):
            part = whole.detach()[place]
            view = part[None] if part.dim() > 1 else part  # the one lane
            net.register_parameter(name, nn.Parameter(view, requires_grad=False))
        return net

    def prepare(self) -> None:
        """Nothing: the grouped call wants no Gram blocks. Here because a DLRNet has it."""

    def extra_repr(self) -> str:
        reason = "no linear layer is in it, and adapters fit linear layers alone"  # for PEFT's refusal
        return f"d={self.spec.chain.hidden_size}, {self.spec}; {reason}"


def empty_chains(
    spec: DLRSpec | ExpertsSpec, stock: nn.Module | None = None, *, dtype: torch.dtype | None = None
) -> DLRNet | DLRExperts:
    """The module of a shape, the zero function; `stock` is what it takes the place of."""
    return (
        DLRExperts(spec, stock, dtype=dtype) if isinstance(spec, ExpertsSpec) else DLRNet(spec, dtype=dtype)
    )


def chain_shapes(spec: DLRSpec | ExpertsSpec) -> dict[str, list[int]]:
    """The tensors that a checkpoint has of a module's chains, and their shapes."""
    net = DLRNet(spec.chain if isinstance(spec, ExpertsSpec) else spec, device="meta")
    shapes = {name: [*parameter.shape] for name, parameter in net.named_parameters()}
    if isinstance(spec, ExpertsSpec):  # the one lane goes, all experts' chains come
        count = len(spec.chained)
        shapes = {name: [count, *(shape[1:] if len(shape) > 1 else shape)] for name, shape in shapes.items()}
    return shapes


def _some(stock: nn.Module, spec: ExpertsSpec, dtype: torch.dtype | None) -> nn.Module:
    """A copy of a mixture's experts that has those alone that stay as they are."""
    some = copy.copy(stock)
    some._parameters = {
        name: p
        if p is None
        else nn.Parameter(p.detach()[list(spec.kept)].to(dtype or p.dtype, copy=True), requires_grad=False)
        for name, p in stock._parameters.items()
    }
    vars(some)["num_experts"] = len(spec.kept)
    return some


def one_expert(experts: nn.Module, number: int, x: Tensor) -> Tensor:
    """What one of a mixture's experts, as transformers has them, or of the chains in their place, makes of tokens
    x [n, d]: [n, d]."""
    if stacked(experts):  # Llama 4: every expert's tokens, one after the other
        count = next(iter(experts.parameters())).shape[0]
        rows = x.new_zeros(count, *x.shape)
        rows[number] = x
        return experts(rows.flatten(0, 1)).view_as(rows)[number]
    index = torch.full((len(x), 1), number, dtype=torch.int64, device=x.device)
    return experts(x, index, torch.ones_like(index, dtype=x.dtype))


def stacked(experts: nn.Module) -> bool:
    """Whether experts of transformers take every expert's tokens one after the other, as Llama 4's do, instead of
    tokens and their routing. Chains in their place take both."""
    if isinstance(experts, Routed):
        return False
    wanted = [p for p in inspect.signature(type(experts).forward).parameters.values() if p.name != "self"]
    return sum(p.kind == p.POSITIONAL_OR_KEYWORD for p in wanted) == 1
