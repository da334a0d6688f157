"""What this program sets in its environment where the user has not, and what an engine that it becomes does not get."""

import os

SPIN = {"GOMP_SPINCOUNT": "5000"}  # see `dlr_lock/_threads.py`
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' own, beside ours
}
OURS = SPIN | QUIET


def set_defaults(values: dict[str, str]) -> None:
    """Sets the variables that are not set."""
    for name, value in values.items():
        os.environ.setdefault(name, value)
