"""How an installation registers locked checkpoints with transformers, though nobody imports dlr_lock.

torch calls `autoload` at its own import (entry point group `torch.backends`). That puts a finder on `sys.meta_path`
which, once `transformers.quantizers.auto` has run, places a stand-in for each of our two classes in its two tables.
The first use of one imports `dlr_lock` and puts the classes in their places. So a program that meets no locked
checkpoint pays for this file alone, and an error of ours is met only by those who load one.

A module of its own beside the package, for it must be found whatever else is called `dlr_lock`: an entry point that
cannot be loaded stops `import torch`, and a source tree of an earlier version in the working directory would do that.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "dlr"
SWITCH = "DLR_LOCK_AUTOLOAD"  # 0 switches this off; importing dlr_lock still registers
_AUTO = "transformers.quantizers.auto"
_TABLES = {"AUTO_QUANTIZATION_CONFIG_MAPPING": "DLRConfig", "AUTO_QUANTIZER_MAPPING": "DLRQuantizer"}


class StandIn(type):
    """A class in a table of transformers that becomes the real one when it is called or asked for an attribute."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _real(cls)(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # looked for by whoever inspects a table: no reason to import anything
            raise AttributeError(name)
        return getattr(_real(cls), name)


def autoload() -> None:
    """The entry point: `install` unless the environment says DLR_LOCK_AUTOLOAD=0. Raises nothing."""
    if os.environ.get(SWITCH) != "0":
        install()


def install() -> None:
    """Registers locked checkpoints, now or when transformers is imported. Raises nothing: a warning tells the cause."""
    with _warned():
        if not any(type(finder) is _Finder for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
        if _is_whole(sys.modules.get(_AUTO)):
            _place()


@contextmanager
def _warned() -> Iterator[None]:
    """What is raised in the block becomes a warning, for it runs within imports that are not ours."""
    try:
        yield
    except Exception as error:
        said = (
            "dlr-lock could not register its checkpoints with transformers, so that they will not load "
            f"({type(error).__name__}: {error}); {SWITCH}=0 switches this off"
        )
        try:
            warnings.warn(said, RuntimeWarning, stacklevel=3)
        except Exception:  # warnings that were made errors
            print(said, file=sys.stderr)


def _is_whole(auto: ModuleType | None) -> bool:
    """Whether the module has run to its end, which torch may be imported before."""
    return hasattr(auto, "get_hf_quantizer")  # the last that it defines


def _place() -> None:
    """Puts the stand-ins into the tables, where these have no entry of the name."""
    tables = vars(sys.modules[_AUTO])
    for table, name in _TABLES.items():
        tables[table].setdefault(METHOD, StandIn(name, (), {"table": table}))


def _real(stand_in: Any) -> Any:
    from dlr_lock.runtime.quantizer import register

    register()
    return getattr(sys.modules[_AUTO], stand_in.table)[METHOD]


class _Finder:
    """Finds nothing itself. It stays on the path: without it an import in another thread would skip a finder."""

    def __init__(self) -> None:
        self._asking = False
        self._running = _AUTO in sys.modules  # it is what imports torch: too late to watch its loader

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name == _AUTO and not self._asking:
            with _warned():
                spec = self._spec(name, path, target)
                if spec is not None:
                    _watch(spec.loader)
                return spec
        if self._running and _is_whole(sys.modules.get(_AUTO)):
            self._running = False
            with _warned():
                _place()
        return None

    def _spec(self, *wanted: Any) -> ModuleSpec | None:
        """What the other finders find. One of them may do the same and ask this one, which then finds nothing."""
        self._asking = True
        try:
            others = [finder for finder in sys.meta_path if finder is not self]
            found = (finder.find_spec(*wanted) for finder in others if hasattr(finder, "find_spec"))
            return next((spec for spec in found if spec is not None), None)
        finally:
            self._asking = False


def _watch(loader: Any) -> None:
    """Fills the tables when the loader has run its module; then the loader is as it was."""
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        del loader.exec_module
        run(module)
        with _warned():
            _place()

    loader.exec_module = exec_module
