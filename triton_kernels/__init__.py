"""The chain on tensors alone: the reference, and the forms that make it fast. Imports nothing else of dlr-lock."""

from .activations import ACTIVATIONS
from .reference import chain_reference, flattened_reference, lane_updates

__all__ = ["ACTIVATIONS", "chain_reference", "flattened_reference", "lane_updates"]
