"""Python runs this as it starts where this folder is on PYTHONPATH: then `dlr_lock` is importable from the source tree,
also in the processes that tests and compilers start (see benchmarks/bootstrap.py)."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_spec = spec_from_file_location("benchmarks_bootstrap", Path(__file__).resolve().parents[1] / "bootstrap.py")
assert _spec is not None and _spec.loader is not None
_bootstrap = module_from_spec(_spec)
_spec.loader.exec_module(_bootstrap)
_bootstrap.install()
