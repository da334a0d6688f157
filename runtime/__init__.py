"""Running locked models: the DLR-Net module, locked checkpoints, and the transformers plugin.

Importing this package registers the checkpoints' quantization method with transformers.
"""

from ..common.errors import DLRError
from .checkpoint import inspect, load, verify
from .config import DLRConfig
from .device import best_device
from .module import DLRNet
from .quantizer import lock, locked_modules
from .spec import DLRSpec

__all__ = [
    "DLRConfig",
    "DLRError",
    "DLRNet",
    "DLRSpec",
    "best_device",
    "inspect",
    "load",
    "lock",
    "locked_modules",
    "verify",
]
