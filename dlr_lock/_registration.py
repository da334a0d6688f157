"""Registers locked checkpoints with transformers: now, or as soon as transformers can load a model.

Not by importing transformers, which takes seconds that a page of help, or `import dlr_lock` alone, should not cost.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_LOADS = "transformers.modeling_utils"  # holds `from_pretrained`; complete, it lets our plugin be imported


class _Registering(Loader):
    """Executes a module as its own loader does, then registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()


class _Finder(MetaPathFinder):
    """Waits for the module, and leaves."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _LOADS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


def _register() -> None:
    from .runtime import quantizer  # noqa: F401


if _LOADS in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _Finder())
