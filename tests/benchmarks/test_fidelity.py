"""The fidelity studies on tiny models: what is written is what was measured."""

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import save_tiny

from dlr_lock.convert.data import english_topics
from dlr_lock.triton_kernels import ChainWeights

TINY = ["--tokens", "2048", "--batch", "256", "--depth", "3", "--rank", "16", "--train-tokens"]
ROOT = Path(__file__).parents[2]
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
        assert row["rate"] == 0.01
        # Two products forward, four backward, and the optimizer's.
        assert 6 < row["flops"] / (2 * 3 * 16 * 64 * row["train_tokens"]) < 60
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


def test_products(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both dtypes whatever this machine is fast at, from float32 weights; the page of measurements shows it."""
    multiplied = []
    in_products = ChainWeights.in_products

    def seen(chain: ChainWeights, products: torch.dtype) -> ChainWeights:
        made = in_products(chain, products)
        multiplied.append((chain.A.dtype, made.A.dtype, made.B.dtype))
        return made

    monkeypatch.setattr(ChainWeights, "in_products", seen)
    source = save_tiny("llama", tmp_path / "source")
    rows = run(tmp_path, "products", source, "--data", text, "--layers", "1", *TINY, "4096,16384")
    assert list(dict.fromkeys(multiplied)) == [
        (torch.float32, dtype, dtype) for dtype in (torch.float32, torch.bfloat16)
    ]
    assert [(row["layer"], row["train_tokens"], row["products"]) for row in rows] == [
        (1, count, name) for count in (4096, 16384) for name in ("float32", "bfloat16")
    ]
    for exact, coarse in (rows[:2], rows[2:]):
        assert exact["error_ratio"] == 1 and exact["flops"] == coarse["flops"] > 0
        assert coarse["error_ratio"] == coarse["rel_error"] / exact["rel_error"] != 1
        assert coarse["error_ratio"] == pytest.approx(1, abs=0.01)
        assert coarse["flatten_gap"] == pytest.approx(exact["flatten_gap"], rel=0.05)
        assert coarse["seconds"] > 0 and coarse["curve"][-1]["train_tokens"] == coarse["train_tokens"]
    assert rows[2]["rel_error"] < rows[0]["rel_error"]
    (found,) = importlib.import_module("benchmarks.render").newest(tmp_path).values()
    page = "\n".join(importlib.import_module("benchmarks.tables").products(found["fidelity-products"]))
    assert f"| 16,384 | bfloat16 | {rows[3]['rel_error']:.4f} | {rows[3]['error_ratio']:.4f} |" in page
    assert "Stopped" not in page


def test_model(text: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    choices = ["2048,4096", "--end-to-end", "2048", "--sequence", "64", "--across", "independent"]
    rows = run(tmp_path, "model", source, "--data", text, *TINY, *choices, "--redistill", "1")
    assert [(row["train_tokens"], row["phase"], row["end_to_end"]) for row in rows] == [
        (count, *end) for count in (2048, 4096) for end in (("modules", 0), ("end_to_end", 2048))
    ]
    assert all(len(row["gaps"]) == 2 and row["kl"] > 0 for row in rows)
    assert all(row["students"]["1"]["kl"] > 0 for row in rows)
    assert rows[2]["flops"] > rows[0]["flops"]
    for fits, end in (rows[:2], rows[2:]):
        points = [fits, *end["looks"], end]
        assert [point["end_to_end"] for point in points] == [0, 512, 1024, 1536, 2048]
        for name in ("seconds", "flops"):  # of all that led to a point
            assert all(a[name] < b[name] for a, b in itertools.pairwise(points))
        steps = [b["flops"] - a["flops"] for a, b in itertools.pairwise(points)]
        assert max(steps) == pytest.approx(min(steps))
        assert end["kl"] < end["looks"][1]["kl"] < fits["kl"]
        assert end["loss_gap"] == pytest.approx(end["loss"] - end["original_loss"])


def test_a_study_that_was_killed_goes_on_from_its_finished_modules(text: Path, tmp_path: Path) -> None:
    """Killed once between the modules and once in the end-to-end phase."""
    source = save_tiny("llama", tmp_path / "source")
    out = tmp_path / "out"
    arguments = ["model", str(source), "--data", str(text), *TINY, "65536", "--across", "sequential"]
    arguments += ["--end-to-end", "32768", "--sequence", "64", "--out", str(out)]

    def killed_at(pattern: str) -> Path:
        """The first file of a pattern; the process that wrote it is killed at once."""
        command = [sys.executable, "-m", "benchmarks.fidelity", *arguments]
        # of as many threads as here: a run on another machine, which more threads make of it, is not gone on with
        own = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        quiet = subprocess.DEVNULL
        study = subprocess.Popen(command, cwd=ROOT, env=own, stdout=quiet, stderr=quiet)
        try:
            until = time.monotonic() + 600
            while not (found := sorted(out.glob(pattern))):
                assert study.poll() is None and time.monotonic() < until
                time.sleep(0.01)
        finally:
            study.kill()
            study.wait()
        return found[0]

    first = killed_at("*.partial/*.safetensors")
    assert len(list(first.parent.glob("*.safetensors"))) == 1 and not list(out.glob("*.json"))
    module = json.loads(first.with_suffix(".json").read_text())
    path = killed_at("*.json")
    before = json.loads(path.read_text())
    assert not before["finished"] and [row["phase"] for row in before["rows"]] == ["modules"]
    assert before["rows"][0]["modules"][0]["seconds"] == module["seconds"]  # it was not fitted again
    earlier = sum(kept["seconds"] for kept in before["rows"][0]["modules"])
    assert before["rows"][0]["seconds"] > earlier  # those of the first run are counted
    assert fidelity.main(arguments) == 0
    (path,) = out.glob("*.json")
    document = json.loads(path.read_text())
    assert document["finished"] and document["rows"][0] == before["rows"][0]
    assert [row["phase"] for row in document["rows"]] == ["modules", "end_to_end"]
    assert document["rows"][1]["seconds"] > document["rows"][0]["seconds"]
    assert not list(out.glob("*.partial"))


def test_the_curve_of_a_model_is_drawn(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    source = save_tiny("llama", tmp_path / "source")
    choices = ["1024", "--end-to-end", "1024", "--sequence", "64", "--across", "independent"]
    rows = run(tmp_path, "model", source, "--data", text, *TINY, *choices)
    (drawn,) = (tmp_path / "out").glob("*.png")
    assert f"written to {drawn}" in capsys.readouterr().out and drawn.read_bytes()[:4] == b"\x89PNG"
    panels = fidelity._of_models(rows)
    assert [x for x, _ in panels] == ["minutes", "FLOPs"]
    for lines in panels.values():
        (line,) = lines.values()
        assert [y for _, y in line] == [rows[0]["kl"], rows[1]["looks"][0]["kl"], rows[1]["kl"]]


def test_sentences(text: Path, tmp_path: Path) -> None:
    source = save_tiny("bert", tmp_path / "source")
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("One river runs north.\nTwo dogs sleep.\nNobody came to the party, which was sad.\n")
    arguments = ("--data", text, "--sentences", sentences, "--sequence", "32", *TINY, "2048")
    (row,) = run(tmp_path, "sentences", source, *arguments)
    assert row["state_error"] > 0 and row["flops"] > 0
    assert (
        row["sentences"] == 3
        and row["worst_cosine"] <= row["embedding_cosine"] <= 1
        and -1 <= row["spearman"] <= 1
    )


def test_spearman_is_the_correlation_of_ranks() -> None:
    spearman = importlib.import_module("benchmarks.fidelity_model").spearman
    a = torch.tensor([0.1, 5.0, 2.0, 9.0])
    assert spearman(a, a.exp()) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert spearman(a, torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(0.8)


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
    for study in ("modules", "products", "model", "sentences"):
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
