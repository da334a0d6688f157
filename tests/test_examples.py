"""Every example, run as a script on a tiny model and a CPU; in this process, for importing torch takes five seconds."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
from tiny import save_tiny

from dlr_lock.convert.data import english_topics

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: object, given: str = "") -> str:
    """What the example prints for these arguments and this standard input."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(given))
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return printed.getvalue()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples/convert.py makes of a tiny model."""
    folder = tmp_path_factory.mktemp("examples")
    save_tiny("llama", folder / "source")
    (folder / "text.txt").write_text(english_topics()[:40_000], encoding="utf-8")
    said = run(
        "convert", folder / "source", folder / "out", "--data", folder / "text.txt", "--tokens", 2048,
        "--train-tokens", 4096,
    )  # fmt: skip
    assert "model.layers.1.mlp: 1x" in said and "held-out loss" in said
    return folder / "out"


def test_convert_says_a_mistake_in_one_line(checkpoint: Path) -> None:
    with pytest.raises(SystemExit, match=r"^convert\.py: .*already locked"):
        run("convert", checkpoint, checkpoint.parent / "new", "--data", checkpoint.parent / "text.txt")


def test_load_and_generate(checkpoint: Path) -> None:
    said = run("load_and_generate", checkpoint, "The river", "--max-new-tokens", 4)
    assert said.startswith("2 locked modules: model.layers.0.mlp") and "The river" in said


def test_serve_completes_a_batch_as_it_completes_one(checkpoint: Path) -> None:
    prompts = ["The river", "A model reads one token at a time", "def forward"]

    def served(batch: int) -> list[dict[str, str]]:
        lines = run("serve", checkpoint, "--batch", batch, "--max-new-tokens", 6, given="\n".join(prompts))
        return [json.loads(line) for line in lines.splitlines()]

    together = served(2)
    assert [row["prompt"] for row in together] == prompts and all(row["completion"] for row in together)
    assert served(1) == together


def test_kernel_benchmark(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "times.json"
    said = run("kernel_benchmark", checkpoint, out, "--tokens", "1,4", "--rounds", 2, "--cold-bytes", 1e5)
    rows = json.loads(out.read_text())["rows"]
    assert {row["tokens"] for row in rows} == {1, 4} and all(
        row["accurate"] and row["median_us"] for row in rows
    )
    assert "dense-eager" in said and "lookahead-eager" in said and " us" in said


def test_examples_are_short_and_all_tried() -> None:
    examples = sorted(EXAMPLES.glob("*.py"))
    tried = Path(__file__).read_text(encoding="utf-8")
    for path in examples:
        assert f'"{path.stem}"' in tried, f"{path.name} is not run by any test"
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, path.name
