"""Locking a model: sources, calibration text, activations, distillation, and the job that joins them."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy_names

if TYPE_CHECKING:
    from .config import ConversionConfig
    from .evaluate import Evaluation
    from .pipeline import convert_model
    from .report import ConversionReport, ModuleReport
    from .use import complete, evaluate_checkpoint

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ConversionConfig": ".config",
        "ConversionReport": ".report",
        "Evaluation": ".evaluate",
        "ModuleReport": ".report",
        "complete": ".use",
        "convert_model": ".pipeline",
        "evaluate_checkpoint": ".use",
    },
)

__all__ = [
    "ConversionConfig",
    "ConversionReport",
    "Evaluation",
    "ModuleReport",
    "complete",
    "convert_model",
    "evaluate_checkpoint",
]
