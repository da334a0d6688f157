"""Every choice of `layers`. Torch is imported where it is needed, for a page of help needs none of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ..common.options import check_names, option
from ..convert.config import ConversionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersConfig:
    """The choices of `costs_of`; every field says in its help what it is."""

    layers: str | None = option(
        None,
        "Those to be locked together: 12-17, or auto:6 for the six that cost least, which are named.",
        "all",
    )
    data: str = option("self", "Text: .txt, .jsonl, .parquet, a datasets name, or self (sampled, slow).")
    tokens: int | None = option(None, "Tokens of it.", "4096, or 4 times the hidden size where that is more")
    effort: str = option("standard", "quick, standard or best: how long each layer is to be trained.")
    train_tokens: int | None = option(None, "The same in training tokens of each module.", "the effort's")
    sequence: int | None = option(None, "Tokens a sequence.", "512, or what the model takes")
    mlps: str | None = option(None, "Regular expression of MLP module names.", "found by structure")
    seed: int = option(0, "Seed of what is drawn.")
    device: str | None = option(None, "cpu, cuda, cuda:1, ...", "the best there is")

    @classmethod
    def of(cls, choices: dict[str, Any]) -> LayersConfig:
        """The choices by name, layers as a conversion spells them. Raises DLRError on a name that there is not."""
        check_names(choices, cls)
        made = cls(**choices)
        layers = (made.layers or "all").strip().lower()
        return replace(made, layers=None if layers == "all" else layers)

    def conversion(self) -> ConversionConfig:
        """The same of a conversion, resolved. Raises DLRError on bad values."""
        return ConversionConfig(**asdict(self), heldout=2).resolved()
