"""For every test: small models gain nothing from threads, and lose much where the machine is busy."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(
    1
)  # a conversion of a tiny model beside one busy core: 28 s with two threads, 0.4 s with one


@pytest.fixture
def nobodys() -> Iterator[Path]:
    """A folder of a user to whom permissions mean something, as whom the test runs; root may read everything."""
    folder = Path(tempfile.mkdtemp())
    if root := os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree, built."""
    folder, tree = tmp_path_factory.mktemp("wheel"), Path(__file__).parents[1]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, tree]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))
