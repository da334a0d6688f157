"""The page of architectures, and the command that makes it."""

from pathlib import Path

import pytest

from benchmarks.architectures import KINDS, TABLE, main, outcome

NAMES = [name for group in KINDS.values() for name in group.split()]


def test_the_page_tells_of_every_architecture() -> None:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ") and "model_type" not in line]
    assert [row[0].removeprefix("| ") for row in rows] == NAMES
    assert all(row[1] in ("locked", "refused") and "Traceback" not in row[2] for row in rows)


@pytest.mark.parametrize("name", ["xglm", "pegasus"])
def test_a_locked_one(name: str, tmp_path: Path) -> None:
    done = outcome(name, tmp_path)
    assert done.locked and not done.bug, done.words


@pytest.mark.parametrize(
    ("name", "why"), [("whisper", "reads input_features"), ("albert", "share their MLP")]
)
def test_a_refused_one(name: str, why: str, tmp_path: Path) -> None:
    done = outcome(name, tmp_path)
    assert not done.locked and not done.bug and why in done.words


def test_a_name_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lama"]) == 2
    assert "unknown architecture lama" in capsys.readouterr().err
