"""For every test: small models gain nothing from threads, and lose much where the machine is busy."""

import os
import shutil
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
