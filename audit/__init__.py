"""What a lock costs whoever trains the locked model."""

from .meters import Meter, StepCounts, count_step, saved_bytes, time_step

__all__ = ["Meter", "StepCounts", "count_step", "saved_bytes", "time_step"]
