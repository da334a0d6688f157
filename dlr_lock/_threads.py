"""Imported before torch: OpenMP threads that wait spin for some microseconds, not for milliseconds.

The distillation runs a product in every thread of its own; the idle team of the main thread, spinning as long as
OpenMP's default is, takes the cores from them: 1,000 ms a step instead of 60 beside one other busy process. Not to
spin at all costs a chain's 100 products a wake-up each: 8.4 ms at 16 tokens instead of 1.8.
"""

import os
import sys

from .common.environment import SPIN, set_defaults

# Where torch is there, OpenMP has read its environment: only children would hear of it.
if "OMP_WAIT_POLICY" not in os.environ and "torch" not in sys.modules:
    set_defaults(SPIN)
