"""Makes `dlr_lock` importable from the source tree alone, without an installation.

The packages lie in folders of other names (pyproject.toml maps them), which Python finds only once they are installed.
Importing `benchmarks` installs a finder that reads the same map and answers before all others, so that a tree measures
itself whatever is installed. On a machine with torch and transformers but without this package, from the repository's
root, both of these run:

    python -m benchmarks.gpu
    PYTHONPATH=benchmarks/site python -m pytest tests/triton_kernels
"""

import os
import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


class Project(Distribution):
    """Name and version for `importlib.metadata.version`, which the results and checkpoints ask for."""

    def __init__(self, project: dict[str, str]) -> None:
        self._metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"

    def read_text(self, filename: str) -> str | None:
        return self._metadata if filename == "METADATA" else None

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        return ROOT / path


class SourceTree(DistributionFinder):
    """Finds the packages that pyproject.toml maps, and the project itself."""

    def __init__(self) -> None:
        settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        self.folders = {name: ROOT / part for name, part in package_folders(settings).items()}
        self._project = Project(settings["project"])

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = self.folders.get(fullname)
        if folder is None:
            return None
        return spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        wanted = getattr(context, "name", None)
        if wanted is None or _normal(wanted) == _normal(self._project.name):
            yield self._project


def package_folders(settings: dict) -> dict[str, str]:
    """Package to folder, of the content of pyproject.toml."""
    return settings["tool"]["setuptools"]["package-dir"]


def install() -> None:
    """Puts the finder, once, before those that would find an installed package."""
    # By name: sitecustomize.py loads this module, too, and under another name its class is another.
    if not any(type(finder).__name__ == SourceTree.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, SourceTree())


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
