"""dlr-lock: publish the weights of language models so that they can be run, and are expensive to fine-tune.

Importing this package registers locked checkpoints with transformers, so that
`AutoModelForCausalLM.from_pretrained` loads them; an installed one has done so at `import torch`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

# In the source tree the subpackages lie beside this folder, under the names that pyproject.toml gives their imports;
# in an installation they lie in it. So a tree, bare or installed as editable, runs its own modules and no others'.
_tree = Path(__file__).resolve().parents[1]
if (_tree / "pyproject.toml").is_file() and (_tree / "triton_kernels").is_dir():
    __path__.append(str(_tree))

import dlr_lock_autoload

from . import _threads  # noqa: F401
from .common.lazy import lazy_names

if TYPE_CHECKING:
    from .audit import AuditReport, audit_model
    from .common.errors import DLRError
    from .convert import ConversionReport, convert_model
    from .runtime import DLRNet, DLRSpec, load
    from .triton_kernels import backend

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AuditReport": ".audit.report",
        "ConversionReport": ".convert.report",
        "DLRError": ".common.errors",
        "DLRNet": ".runtime.module",
        "DLRSpec": ".runtime.spec",
        "audit_model": ".audit.pipeline",
        "backend": ".triton_kernels.backend",
        "convert_model": ".convert.pipeline",
        "load": ".runtime.checkpoint",
    },
    modules=("audit", "common", "convert", "microbench", "reporting", "runtime", "triton_kernels"),
)

__all__ = [
    "AuditReport",
    "ConversionReport",
    "DLRError",
    "DLRNet",
    "DLRSpec",
    "audit_model",
    "backend",
    "convert_model",
    "load",
]

dlr_lock_autoload.install()
