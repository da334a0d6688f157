"""dlr-lock: publish open-weight language models that run as cheaply as before and are expensive to fine-tune.

Importing this package registers locked checkpoints with transformers, so that
`AutoModelForCausalLM.from_pretrained` loads them.
"""

from . import _threads  # noqa: F401
from .audit import AuditReport, audit_model
from .convert import ConversionReport, convert_model
from .runtime import DLRError, DLRNet, DLRSpec, load
from .triton_kernels import backend

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
