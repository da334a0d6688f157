"""Two models' scores and speeds as sections."""

from collections.abc import Sequence

from ..reporting import Section, Table, headings
from ..reporting.words import cell
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
