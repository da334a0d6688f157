"""What an attacker does with a locked model: attacks on its training, on its structure, and redistillation."""

from . import gradient, mezo  # noqa: F401  (each registers its attacks on training)
from .contract import TRAINING_ATTACKS, TrainingAttack, register

__all__ = ["TRAINING_ATTACKS", "TrainingAttack", "register"]
