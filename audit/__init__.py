"""What a lock costs whoever trains the locked model: meters, attacks, verdicts."""

from .meters import Meter, StepCounts, count_step, saved_bytes, time_step
from .pipeline import audit_model
from .report import AuditReport

__all__ = ["AuditReport", "Meter", "StepCounts", "audit_model", "count_step", "saved_bytes", "time_step"]
