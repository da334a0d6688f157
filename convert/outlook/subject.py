"""The model that a conversion is reckoned for: shapes and sizes of files, no numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..experts.routing import Mixture
from ..mlp_matching import MLP

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Subject:
    """A model to reckon for.

    Attributes:
        name: As the caller gave it.
        model: It, or its class on the meta device.
        mlps: The MLPs that are converted, in model order.
        every: All that it has, in model order.
        dtype: Of most of its files' numbers, once they are plain.
        files: Bytes of the weight files.
        copied: Bytes of the copies that are made first, of quantised files and of adapters in their bases; 0 for none.
    """

    name: str
    model: PreTrainedModel
    mlps: list[MLP]
    every: list[MLP]
    dtype: torch.dtype
    files: int
    copied: int = 0

    @property
    def params(self) -> int:
        """Parameters of the model; tied ones count once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def disk(self) -> int:
        """Bytes of the files that the conversion reads."""
        return self.files + self.copied

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of the lists that hold MLPs: of an encoder-decoder both."""
        holders: dict[str, nn.ModuleList] = {}
        for mlp in self.every:
            path = mlp.module.split(".")
            for end in range(1, len(path)):
                part = self.model.get_submodule(".".join(path[:end]))
                if isinstance(part, nn.ModuleList):
                    holders[".".join(path[:end])] = part
                    break
        return [layer for layers in holders.values() for layer in layers] or [self.model]

    @property
    def body_matrices(self) -> float:
        """Numbers in the matrices that a token meets on its way through all layers: of a mixture's experts those that
        it is given to."""
        idle = sum(
            mlp.params * (1 - mlp.chosen / mlp.experts) for mlp in self.every if isinstance(mlp, Mixture)
        )
        return sum(matrices_of(layer) for layer in self.layers) - idle

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.model.get_input_embeddings().weight.shape[0]


def matrices_of(module: nn.Module) -> int:
    """Numbers in a module's matrices."""
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)
