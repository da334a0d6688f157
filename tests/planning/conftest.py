"""Where plans are made."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a text in it, of which a plan wants to know no more than that it is there."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    Path("text.txt").write_text("a word", encoding="utf-8")
