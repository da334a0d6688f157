"""What a lock costs whoever trains the locked model: meters, attacks, verdicts."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy_names

if TYPE_CHECKING:
    from .meters import Meter, StepCounts, count_step, saved_bytes, time_step
    from .pipeline import audit_model
    from .report import AuditReport

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AuditReport": ".report",
        "Meter": ".meters",
        "StepCounts": ".meters",
        "audit_model": ".pipeline",
        "count_step": ".meters",
        "saved_bytes": ".meters",
        "time_step": ".meters",
    },
)

__all__ = ["AuditReport", "Meter", "StepCounts", "audit_model", "count_step", "saved_bytes", "time_step"]
