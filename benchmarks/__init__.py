"""Measurements: `python -m benchmarks.kernels` for the whole table, `make bench` for a small set, `make gpu` for all
that a GPU can show."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a tree measures itself, whatever is installed
