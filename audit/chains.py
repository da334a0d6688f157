"""The chains of a locked model one by one: of an MLP, or of one of a mixture's experts.

An attack on a chain knows none of mixtures: an expert's chain is a DLRNet like any other (`DLRExperts.net`), gets the
tokens that the router gives its expert, and what is made of it stands in its place among the other experts'.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.hooks import frozen, removed, run_body
from ..convert.activations.capture import batch_of
from ..convert.activations.pairs import Activations
from ..convert.experts.pairs import MixturePairs
from ..convert.experts.routing import Mixture, read_call
from ..convert.mlp_matching import MLP
from ..runtime import DLRExperts, DLRNet, DLRSpec, ExpertsSpec
from ..runtime.experts import Routed
from ..triton_kernels import chain_reference, one_by_one

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .context import AuditContext

# What an expert must get for its chain to be distilled back: of the attacker's text, and held out by either model.
_LEAST_TOKENS, _LEAST_HELDOUT = 64, 8


@dataclass(frozen=True)
class Chain:
    """One chain of a locked model.

    Attributes:
        mlp: What it stands in the place of, or is among the experts of.
        expert: The expert's number; None of a dense MLP's chain.
        part: Of a module's tokens, those that the chain gets, 0 to 1.
    """

    mlp: MLP
    expert: int | None = None
    part: float = 1.0

    @property
    def name(self) -> str:
        """The module's name and, of a mixture, the expert's number."""
        return self.mlp.module if self.expert is None else f"{self.mlp.module}, expert {self.expert}"

    @property
    def number(self) -> int:
        """Different for every chain of a mixture, and for dense ones in different layers; what draws depend on."""
        experts = self.mlp.experts if isinstance(self.mlp, Mixture) else 1
        return self.mlp.layer * experts + (self.expert or 0)

    def tokens(self, of_module: int) -> int:
        """How many of so many tokens of the module are the chain's, at least one."""
        return max(1, round(self.part * of_module))

    def net(self, locked: PreTrainedModel) -> DLRNet:
        """The chain in a locked model; its parameters are the model's, or views of them."""
        module = locked.get_submodule(self.mlp.module)
        if isinstance(module, DLRExperts):
            assert self.expert is not None
            return module.net(self.expert)
        assert isinstance(module, DLRNet)
        return module


def chains_of(mlps: Iterable[MLP], locked: PreTrainedModel) -> list[Chain]:
    """All chains in the places of these MLPs, as if every expert got as many tokens."""
    found = []
    for mlp in mlps:
        module = locked.get_submodule(mlp.module)
        if isinstance(mlp, Mixture) and isinstance(module, DLRExperts):
            part = mlp.chosen / mlp.experts
            found += [Chain(mlp, expert, part) for expert in module.spec.chained]
        else:
            found.append(Chain(mlp))
    return found


def chain_spec(spec: DLRSpec | ExpertsSpec) -> DLRSpec:
    """The shape of a module's chain, of a mixture that of each."""
    return spec.chain if isinstance(spec, ExpertsSpec) else spec


class ExpertNets(Routed):
    """A mixture's chains with other nets in the places of some.

    They run by their definition, which can be trained.

    Args:
        chains: The mixture's.
        nets: What stands in the places of some experts' chains, by the experts' numbers.
    """

    def __init__(self, chains: DLRExperts, nets: Mapping[int, DLRNet]) -> None:
        super().__init__(chains.spec, chains.dlr_kept)
        device = chains.dlr_A.device
        self.nets = nn.ModuleList(
            _on(device, nets[expert]) if expert in nets else chains.net(expert)
            for expert in chains.spec.chained
        )

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """One net after the other."""
        return one_by_one(x, ends, [partial(_defined, net) for net in self.nets])


def _on(device: torch.device, net: DLRNet) -> DLRNet:
    return net if net.dlr_A.device == device else copy.deepcopy(net).to(device)


def _defined(net: Any, x: Tensor) -> Tensor:
    return chain_reference(x, net.chain)


def in_places(locked: PreTrainedModel, nets: Mapping[Chain, DLRNet]) -> dict[str, nn.Module]:
    """What stands in modules' places where nets stand in chains', by the modules' names."""
    places: dict[str, nn.Module] = {}
    experts: dict[str, dict[int, DLRNet]] = {}
    for chain, net in nets.items():
        if chain.expert is None:
            places[chain.mlp.module] = net
        else:
            experts.setdefault(chain.mlp.module, {})[chain.expert] = net
    for name, some in experts.items():
        module = locked.get_submodule(name)
        assert isinstance(module, DLRExperts)
        places[name] = ExpertNets(module, some)
    return places


def by_chain(
    model: PreTrainedModel, mlp: MLP, pairs: Activations, train: int, *, corrected: bool = False
) -> Callable[[Chain], tuple[Activations, int]]:
    """Gives of a module's activations those of each of its chains, and how many of the rows are trained on.

    Args:
        model: The model whose module gives the outputs.
        mlp: The module.
        pairs: x and y of the module, and of a mixture the routing; y may be overwritten.
        train: How many rows, from the first, are trained on.
        corrected: Whether a mixture's y is more than what its experts give.
    """
    if not isinstance(mlp, Mixture):
        return lambda chain: (pairs, train)
    with torch.no_grad():
        experts = MixturePairs(model, mlp, pairs, train, corrected)

    @torch.no_grad()
    def of(chain: Chain) -> tuple[Activations, int]:
        assert chain.expert is not None
        own = experts.of(chain.expert)
        return own.pairs, own.train

    return of


def fullest(context: AuditContext) -> dict[str, Chain]:
    """The chains that are distilled back, by name: all of MLPs, and of each mixture those of the experts that get the
    most tokens of the attacker's text, as many as the configuration says. Notes say which are left out."""
    mixtures = [mlp for mlp in context.mlps if isinstance(mlp, Mixture)]
    text = context.neutral
    looks = (context.locked, text.train), (context.locked, text.heldout), (context.original, text.heldout)
    counts = [_routed(model, mixtures, tokens) for model, tokens in looks] if mixtures else []
    most = context.config.experts or 0
    found: dict[str, Chain] = {}
    for mlp in context.mlps:
        chains = chains_of([mlp], context.locked)
        if isinstance(mlp, Mixture):
            train, *held = (count[mlp.module] for count in counts)
            least = [min(of_models) for of_models in zip(*held, strict=True)]
            module = context.locked.get_submodule(mlp.module)
            assert isinstance(module, DLRExperts)
            fed = [
                expert
                for expert in module.spec.chained
                if train[expert] >= _LEAST_TOKENS and least[expert] >= _LEAST_HELDOUT
            ]
            chosen = sorted(sorted(fed, key=lambda expert: -train[expert])[:most])
            chains = [Chain(mlp, expert, train[expert] / text.train.numel()) for expert in chosen]
            context.notes += _left_out(mlp, len(train), chains, len(chosen) < len(fed))
        found |= {chain.name: chain for chain in chains}
    return found


def _left_out(mlp: Mixture, experts: int, chains: Sequence[Chain], sampled: bool) -> list[str]:
    if len(chains) == experts:
        return []
    share = sum(chain.part for chain in chains) / mlp.chosen
    why = "--experts takes more" if sampled else f"the others have none, or got under {_LEAST_TOKENS} tokens"
    return [
        f"{len(chains)} of {experts} experts of {mlp.module} were distilled back, those with the most tokens "
        f"({share:.0%} of the mixture's; {why}): redistilled models keep the others as they are, "
        "and their price is of undoing a part"
    ]


def _routed(model: PreTrainedModel, mixtures: Sequence[Mixture], tokens: Tensor) -> dict[str, list[int]]:
    """How many of tokens [S, n] each expert is given, by the mixtures' names."""
    counts = {mlp.module: torch.zeros(mlp.experts, dtype=torch.int64) for mlp in mixtures}

    def look(mlp: Mixture, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routing = read_call(mlp, args, kwargs)[1]
        assert routing is not None
        given = routing.chosen.flatten().cpu().clamp(max=mlp.experts)
        counts[mlp.module] += given.bincount(minlength=mlp.experts + 1)[:-1]

    hooks = [
        model.get_submodule(mlp.module).register_forward_pre_hook(partial(look, mlp), with_kwargs=True)
        for mlp in mixtures
    ]
    with removed(hooks):
        for ids in tokens.split(batch_of(tokens.shape[1])) if mixtures else ():
            with frozen(model):
                run_body(model, ids)
    return {name: count.tolist() for name, count in counts.items()}
