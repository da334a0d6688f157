"""Running locked models: the DLR-Net module, locked checkpoints, and the transformers plugin.

Importing this package registers the checkpoints' quantization method with transformers.
"""

from .checkpoint import best_device, inspect, load, verify
from .config import DLRConfig
from .errors import DLRError
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
