"""Packages whose names are imported at first use: a page of help must not cost the five seconds of torch."""

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, str], modules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package that imports what it offers when it is first asked for.

    Args:
        package: The package's name, `__name__` in its `__init__`.
        names: What it offers, and the module of each, relative: {"load": ".checkpoint"}. A module must not be called
            as a name is.
        modules: Submodules that are attributes without having been imported.

    Returns:
        The two functions.
    """

    def get(name: str) -> Any:
        if name in modules:
            return import_module(f".{name}", package)
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(names[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names, *modules})

    return get, listed
