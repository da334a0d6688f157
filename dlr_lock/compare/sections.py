"""Two models' scores and speeds as sections."""

from collections.abc import Sequence
from typing import Any

from ..reporting import Section, Table, headings
from ..reporting.words import bytes_words, cell, count_words
from .tasks import TaskScore


def tasks_sections(scores: Sequence[TaskScore]) -> list[Section]:
    """Scores of tasks in one table; columns that no row fills are left out."""
    columns = headings(
        "task | metric | shots | questions | locked | original | difference | flips | lost | gained"
    )
    rows = [
        (
            s.task,
            _metric(s),
            cell(s.shots),
            f"{s.questions:,}",
            _score(s.score, s.stderr),
            _score(s.original_score, s.original_stderr),
            _difference(s),
            *(cell(share, ".1%") for share in (s.flips, s.lost, s.gained)),
        )
        for s in scores
    ]
    names = {"flips": "answers flipped"}
    table = Table([names.get(c, c) for c in columns], rows).filled()
    return [Section("Tasks, by lm-evaluation-harness", table=table)]


def _metric(score: TaskScore) -> str:
    name = score.metric if score.filter == "none" else f"{score.metric}, {score.filter}"
    return f"{name} (lower is better)" if score.higher_is_better is False else name


def _score(value: float | None, error: float | None) -> str:
    return cell(value, ".4f") + ("" if error is None else f" ± {error:.4f}")


def _difference(score: TaskScore) -> str:
    if score.score is None or score.original_score is None:
        return "-"
    return _score(score.score - score.original_score, score.difference_stderr)


def speed_sections(document: dict[str, Any]) -> list[Section]:
    """Both models' speeds, a row a batch and model: medians, and how far the runs lie apart."""
    settings = document["settings"]
    vllm = settings["engine"] == "vllm"
    engine = f"vLLM {document['versions']['vllm']}" if vllm else "transformers"
    memory = "the process with all of an engine" if vllm else "the weights and a run"
    text = (
        f"{document['device']}, {settings['dtype']}, by {engine}{', eager' * settings['eager']}; prompts of "
        f"{count_words(settings['prompt'], 'token')}, {settings['new_tokens']} new ones each; medians of "
        f"{count_words(settings['repeats'], 'run')} in turns, ± half of what lies between the 20th and the 80th "
        f"percentile; ratios of the locked model's to the original's; memory of {memory}."
    )
    columns = headings(
        "batch | model | first token ms | prefill tokens/s | ratio | decode tokens/s | ratio | memory"
    )
    rows = [
        (
            str(row["batch"]),
            row["side"],
            _median(row["first_token_s"], 1e3),
            _median(row["prefill_tokens_per_s"]),
            _ratio(row, "prefill_ratio"),
            _median(row["decode_tokens_per_s"]),
            _ratio(row, "decode_ratio"),
            cell(row["peak_bytes"], bytes_words),
        )
        for row in document["rows"]
    ]
    notes = [
        f"batch {row['batch']}, {row['side']}: {row['error_message']}"
        for row in document["rows"]
        if row["error_message"]
    ]
    return [Section("", text, Table(columns, rows).filled(), notes)]


def _median(figures: list[float] | None, scale: float = 1.0) -> str:
    if figures is None:
        return "-"
    low, middle, high = figures
    return f"{scale * middle:,.1f} ± {50 * (high - low) / middle:.0f}%"


def _ratio(row: dict[str, Any], name: str) -> str:
    """The locked model's figure over the original's."""
    return cell(row[name] if row["side"] == "locked" else None, ".2f")
