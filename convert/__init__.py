"""Locking a model: sources, calibration text, distillation, checkpoints."""
