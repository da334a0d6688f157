"""Measurements: `python -m benchmarks.kernels` for the whole table, `make bench` for a small set."""
