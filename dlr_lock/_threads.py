"""Imported before torch: OpenMP threads that wait must not spin.

The distillation runs a product in every thread of its own; the idle team of the main thread, spinning as OpenMP's
default is, takes the cores from them: 1,000 ms a step instead of 60 beside one other busy process.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
