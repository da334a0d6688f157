"""A folder with tiny models and their locked checkpoints, for whole audits."""

from pathlib import Path

import pytest
from tiny import save_tiny

import dlr_lock
from dlr_lock.audit.texts import invented_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, and for llama and bert the original and <name>-locked."""
    folder = tmp_path_factory.mktemp("audit")
    (folder / "text.txt").write_text("\n".join(invented_lines(40_000, 9)), encoding="utf-8")
    for arch in ("llama", "bert"):
        save_tiny(arch, folder / arch)
        dlr_lock.convert_model(
            folder / arch, folder / f"{arch}-locked", data=str(folder / "text.txt"), tokens=2048, heldout=512,
            train_tokens=4096, sequence=32, redistill=0.0, device="cpu", depth=4,
        )  # fmt: skip
    return folder
