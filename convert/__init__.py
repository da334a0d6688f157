"""Locking a model: sources, calibration text, activations, distillation, and the job that joins them."""

from .evaluate import Evaluation, evaluate
from .job import convert_model
from .options import Options
from .report import ConversionReport, ModuleReport
from .use import complete, evaluate_checkpoint

__all__ = [
    "ConversionReport",
    "Evaluation",
    "ModuleReport",
    "Options",
    "complete",
    "convert_model",
    "evaluate",
    "evaluate_checkpoint",
]
