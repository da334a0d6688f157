"""What a lock costs whoever trains the locked model."""

from .cost import StepCost, saved_bytes, step_cost

__all__ = ["StepCost", "saved_bytes", "step_cost"]
