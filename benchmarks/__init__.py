"""Measurements: `python -m benchmarks.kernels` for the whole table, `make bench` for a small set, `make gpu` for all
that a GPU can show."""

from . import bootstrap

bootstrap.install()
