"""The study of a conversion's memory, on a model that any machine has room for."""

import json
from pathlib import Path

import pytest

from benchmarks.memory import main, make_llama
from benchmarks.output import RESULTS
from dlr_lock.convert.source import open_source


def test_a_limit_that_is_not_kept_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Python and torch alone take more than 50 MiB; the conversion is finished all the same."""
    folder, out = tmp_path / "work", tmp_path / "out"
    choices = ["--layers", "1", "--max-memory", "100K", "--train-tokens", "128", "--limit", "0.05"]
    assert main(["--folder", str(folder), "--shape", "tiny", "--out", str(out), *choices]) == 1
    (file,) = out.glob("memory-tiny-*.json")
    document = json.loads(file.read_text())
    assert document["finished"] and document["peak"] > 0.05 * 2**30
    assert [m["layer"] for m in document["report"]["modules"]] == [1]
    assert "peak" in capsys.readouterr().out
    assert not (folder / "model").exists() and not (folder / "locked").exists()


def test_what_is_committed_kept_within_12_gib() -> None:
    """Two layers of a model of 15 GiB, converted to the end."""
    found = list(RESULTS.glob("*/memory-8b-*.json"))
    assert found
    for path in found:
        document = json.loads(path.read_text())
        assert document["finished"] and document["peak"] < 12 * 2**30 < document["model_bytes"], path
        assert [m["layer"] for m in document["report"]["modules"]] == [0, 1], path


def test_its_model_is_one_that_is_locked_like_any_other(tmp_path: Path) -> None:
    make_llama(tmp_path, 32, 64, 3, 2, 1, 300)
    source = open_source(tmp_path, dtype="auto", device="cpu")
    assert len(source.model.model.layers) == 3 and source.tokenizer is not None
    assert len({p.data_ptr() for p in source.model.parameters()}) == len(list(source.model.parameters()))
