"""Locking a model: sources, calibration text, activations, distillation, and the job that joins them."""

from .config import ConversionConfig
from .evaluate import Evaluation, evaluate
from .pipeline import convert_model
from .report import ConversionReport, ModuleReport
from .use import complete, evaluate_checkpoint

__all__ = [
    "ConversionConfig",
    "ConversionReport",
    "Evaluation",
    "ModuleReport",
    "complete",
    "convert_model",
    "evaluate",
    "evaluate_checkpoint",
]
