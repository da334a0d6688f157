"""Locking a model: sources, calibration text, activations, distillation, and the job that joins them."""

from .evaluate import Evaluation, evaluate
from .job import convert_model
from .options import Options
from .report import ConversionReport, ModuleReport

__all__ = ["ConversionReport", "Evaluation", "ModuleReport", "Options", "convert_model", "evaluate"]
