"""Running locked models: the DLR-Net module, locked checkpoints, and the transformers plugin."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy_names

if TYPE_CHECKING:
    from ..common.errors import DLRError
    from .checkpoint import inspect, load, verify
    from .config import DLRConfig
    from .device import best_device
    from .experts import DLRExperts, ExpertsSpec
    from .module import DLRNet
    from .quantizer import lock, locked_modules
    from .spec import DLRSpec

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DLRConfig": ".config",
        "DLRError": "..common.errors",
        "DLRExperts": ".experts",
        "DLRNet": ".module",
        "DLRSpec": ".spec",
        "ExpertsSpec": ".experts",
        "best_device": ".device",
        "inspect": ".checkpoint",
        "load": ".checkpoint",
        "lock": ".quantizer",
        "locked_modules": ".quantizer",
        "verify": ".checkpoint",
    },
)

__all__ = [
    "DLRConfig",
    "DLRError",
    "DLRExperts",
    "DLRNet",
    "DLRSpec",
    "ExpertsSpec",
    "best_device",
    "inspect",
    "load",
    "lock",
    "locked_modules",
    "verify",
]
