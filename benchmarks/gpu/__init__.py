"""One command that measures all on a GPU: `make gpu`, or `python -m benchmarks.gpu`; see plan.py for its stages."""
