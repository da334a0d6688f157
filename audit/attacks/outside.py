"""The attack on training that leaves the chains alone: they run, and everything else learns."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from ..strategies.table import Strategy
from .contract import register
from .gradient import GradientAttack


class OutsideOnly(GradientAttack):
    """Of all weights, those that are not in the MLPs' places are trained. A step needs no gradients of chains' weights,
    but those that pass the chains."""

    @contextmanager
    def trained(
        self, model: PreTrainedModel, mlps: Sequence[str], strategy: Strategy
    ) -> Iterator[list[Tensor]]:
        """All weights of the model but those within `mlps`."""
        with super().trained(model, mlps, strategy) as weights:
            for name in mlps:
                model.get_submodule(name).requires_grad_(False)
            yield [weight for weight in weights if weight.requires_grad]


register(OutsideOnly("outside", "All weights but those in the MLPs' places are trained.", 1e-4, "weights"))
