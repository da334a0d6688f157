"""The fidelity studies on tiny models: what is written is what was measured."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from tiny import save_tiny

from dlr_lock.convert.data import english_topics

TINY = ["--tokens", "2048", "--batch", "256", "--depth", "3", "--rank", "16", "--train-tokens"]
fidelity = importlib.import_module("benchmarks.fidelity")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "topics.txt"
    path.write_text(english_topics()[:40_000], encoding="utf-8")
    return path


def run(tmp_path: Path, *arguments: object) -> list[dict]:
    assert fidelity.main([*map(str, arguments), "--out", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    assert str(tmp_path) not in path.read_text()  # it is committed: nothing of this machine's folders
    document = json.loads(path.read_text())
    assert document["device"] and document["date"] and document["versions"]["torch"]
    return document["rows"]


def test_modules(text: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    arguments = (
        source,
        "--data",
        text,
        "--layers",
        "1",
        *TINY,
        "1024,8192",
        "--redistill",
        "0.5",
        "--rate",
        "0.01",
    )
    rows = run(tmp_path, "modules", *arguments)
    assert [row["train_tokens"] for row in rows] == [1024, 8192]
    for row in rows:
        assert row["flops"] == 6 * (2 * 3 * 16 * 64 + 2 * 64) * row["train_tokens"] and row["rate"] == 0.01
        assert row["curve"][-1]["train_tokens"] == row["train_tokens"]
        assert row["curve"][-1]["rel_error"] == pytest.approx(row["rel_error"], rel=1e-5)
        assert [attack["init"] for attack in row["attacks"]] == ["linear", "flat", "random"]
        assert {attack["cost"] for attack in row["attacks"]} == {0.5}
        assert [attack["merged_error"] is None for attack in row["attacks"]] == [False, True, True]
        merged = row["attacks"][0]["merged_error"] <= 1.05 * row["rel_error"]
        undone = any(a["error"] <= 1.05 * a["chain_error"] for a in row["attacks"] if a["init"] != "random")
        assert row["merges"][0]["steps"] == 1 and row["merges"][0]["error"] > 0
        wanted = (
            {"least": 0, "most": 0 if merged else 0.5} if merged or undone else {"least": 0.5, "most": None}
        )
        assert row["undoing_over_conversion"] == wanted
    assert rows[1]["rel_error"] < rows[0]["rel_error"]


def test_model(text: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    rows = run(
        tmp_path, "model", source, "--data", text, *TINY, "4096", "--end-to-end", "2048", "--redistill", "1"
    )
    assert [(row["across"], row["phase"]) for row in rows] == [
        (across, phase) for across in ("independent", "sequential") for phase in ("modules", "end_to_end")
    ]
    assert all(len(row["gaps"]) == 2 and row["kl"] > 0 for row in rows)
    assert rows[3]["kl"] < rows[2]["kl"]
    assert all(row["students"]["1"]["kl"] > 0 for row in rows)


def test_sentences(text: Path, tmp_path: Path) -> None:
    source = save_tiny("bert", tmp_path / "source")
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("One river runs north.\nTwo dogs sleep.\nNobody came to the party, which was sad.\n")
    arguments = ("--data", text, "--sentences", sentences, "--sequence", "32", *TINY, "2048")
    (row,) = run(tmp_path, "sentences", source, *arguments)
    assert (
        row["sentences"] == 3
        and row["worst_cosine"] <= row["embedding_cosine"] <= 1
        and -1 <= row["spearman"] <= 1
    )


def test_spearman_is_the_correlation_of_ranks() -> None:
    a = torch.tensor([0.1, 5.0, 2.0, 9.0])
    assert fidelity.spearman(a, a.exp()) == pytest.approx(1)
    assert fidelity.spearman(a, -a) == pytest.approx(-1)
    assert fidelity.spearman(a, torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--train-tokens", "many"], "many"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--redistill", "2,x"], "2,x"),
    ],
)
def test_bad_input_is_one_line(
    change: list[str], says: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_tiny("llama", tmp_path / "source")
    arguments = ["modules", str(source), "--data", str(text), *TINY, "2048", "--layers", "0"]
    assert fidelity.main([*arguments, "--out", str(tmp_path / "out"), *change]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("benchmarks.fidelity: ") and says in last


def test_help_of_every_study_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for study in ("modules", "model", "sentences"):
        with pytest.raises(SystemExit, match="0"):
            fidelity.main([study, "--help"])
        assert "--layers" in capsys.readouterr().out


def test_a_mixed_text_keeps_its_sentences_apart(tmp_path: Path) -> None:
    main = importlib.import_module("benchmarks.mixed_text").main
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        lines = [
            f"<p>Sentence {i} of source {number} is about fifty characters long.</p>\n" for i in range(9000)
        ]
        (tmp_path / str(number) / "a.html").write_text("".join(lines))
    files = [str(tmp_path / str(number) / "a.html") for number in (1, 2)]
    out, held = tmp_path / "text.txt", tmp_path / "sentences.txt"
    assert main(["--out", str(out), "--sentences", str(held), *files]) == 0
    text, sentences = out.read_text(), held.read_text().splitlines()
    assert "<p>" not in text and "source 1" in text and "source 2" in text
    assert len(sentences) == 500 and not any(line in text for line in sentences)
