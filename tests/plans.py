"""Plans of small models, with choices that take no time to count."""

from pathlib import Path
from typing import Any

from dlr_lock.planning.plan import Plan, plan_conversion

CHOICES: dict[str, Any] = {
    "tokens": 512, "heldout": 128, "train_tokens": 1024, "batch": 64, "sequence": 32, "depth": 3, "rank": 16,
    "redistill": 0.0,
}  # fmt: skip


def planned(folder: Path, **choices: Any) -> Plan:
    """The plan of a conversion on one H200, or several, of the text that tests/planning has where they run."""
    return plan_conversion(folder, device="h200", **({"data": "text.txt"} | CHOICES | choices))
