"""The chain on tensors alone: the reference, and the forms that make it fast. Imports nothing else of dlr-lock."""

from .activations import ACTIVATIONS
from .backend import BACKENDS, backend, current_backend
from .chain import ChainWeights
from .cost import gram_width
from .experts import ExpertChains, dlr_experts, experts_reference, grouped, one_by_one
from .lookahead import gram_blocks, lookahead
from .op import compile_native, dlr_net, wants_gram
from .reference import chain_reference, flattened_reference, lane_updates

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "ChainWeights",
    "ExpertChains",
    "backend",
    "chain_reference",
    "compile_native",
    "current_backend",
    "dlr_experts",
    "dlr_net",
    "experts_reference",
    "flattened_reference",
    "gram_blocks",
    "gram_width",
    "grouped",
    "lane_updates",
    "lookahead",
    "one_by_one",
    "wants_gram",
]
