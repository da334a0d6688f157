"""dlr-lock: publish the weights of language models so that they can be run, and are expensive to fine-tune.

Importing this package registers locked checkpoints with transformers, so that
`AutoModelForCausalLM.from_pretrained` loads them; an installed one has done so at `import torch`.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In the source tree the subpackages lie beside this folder, under the names that pyproject.toml gives their imports;
# in an installation they lie in it. So a tree, bare or installed as editable, runs its own modules and no others'.
_tree = Path(__file__).resolve().parents[1]
if (_tree / "pyproject.toml").is_file() and (_tree / "triton_kernels").is_dir():
    __path__.append(str(_tree))

import dlr_lock_autoload

from . import _threads  # noqa: F401

if TYPE_CHECKING:
    from .audit import AuditReport, audit_model
    from .common.errors import DLRError
    from .convert import ConversionReport, convert_model
    from .runtime import DLRNet, DLRSpec, load
    from .triton_kernels import backend

# Where the public names are: each is imported when it is first asked for, for transformers takes seconds.
_HOMES = {
    "AuditReport": "audit",
    "ConversionReport": "convert",
    "DLRError": "common.errors",
    "DLRNet": "runtime",
    "DLRSpec": "runtime",
    "audit_model": "audit",
    "backend": "triton_kernels",
    "convert_model": "convert",
    "load": "runtime",
}
_PARTS = ("audit", "common", "convert", "microbench", "reporting", "runtime", "triton_kernels")

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


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
