"""What transformers would fill, or pass over, without a word."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...common.dtypes import dtype_name
from ...common.errors import DLRError
from ...common.weights import OnDemand

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_missing(info: dict[str, Any], where: Path) -> None:
    """Raises DLRError on what a checkpoint lacks, by what transformers says of the loading: it fills that with random
    numbers. Tied weights do not count as lacking."""
    for what in ("missing_keys", "mismatched_keys"):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(what) or ())
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            how = "lacks" if what == "missing_keys" else "has the wrong shape for"
            raise DLRError(f"{where} {how} {names[0]}{more}: fetch the whole model")


def check_finite(model: PreTrainedModel, where: Path, weights: OnDemand | None = None) -> None:
    """Raises DLRError where a model's weights are NaN or infinite. weights: where they come and go, if they do."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    away = weights.numbers() if weights is not None else ((p, p) for p in model.parameters())
    for parameter, numbers in away:
        # The extremes are NaN where anything is; isfinite() of every number takes 34 times as long, and room.
        if (
            numbers.is_floating_point()
            and numbers.numel()
            and not torch.stack(numbers.aminmax()).isfinite().all()
        ):
            kind = dtype_name(parameter.dtype)
            raise DLRError(f"{where}: {names[id(parameter)]} has NaN or infinity in its weights (as {kind})")
