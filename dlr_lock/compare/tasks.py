"""Benchmark tasks by lm-evaluation-harness, on a locked model and on its original, question by question.

Scores and standard errors are the harness's own. What it does not give for two models is how many answers changed:
scores that are alike may hide as many answers lost as gained ("Accuracy is Not All You Need", arXiv 2407.09141).
"""

import difflib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..common.errors import DLRError, first_line
from ..common.progress import Progress, no_progress
from ..convert.evaluate import predicts_next
from ..convert.use import opened

# Requests that are handed over at once, between two signs of progress. The harness sorts them by their length to pad
# little: a hundred are enough for that.
_SLICE = 128


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task, or of a group of tasks. None: not defined for it, or no original was given.

    Attributes:
        task, metric, filter: As the harness names them.
        questions: How many were asked.
        shots: Worked examples before each.
        higher_is_better: Which way the metric points.
        score, stderr: Of the locked model.
        original_score, original_stderr: Of the original.
        flips: Share of questions that one of the two answers rightly and the other wrongly, 0 to 1. Only for metrics
            that call an answer right or wrong, and are the mean of that; so are `lost` and `gained`.
        lost: The share that only the original answers rightly.
        gained: The share that only the locked model does.
        difference_stderr: The standard error of score - original_score over the same questions.
    """

    task: str
    metric: str
    filter: str
    questions: int
    shots: int | None
    higher_is_better: bool | None
    score: float | None
    stderr: float | None
    original_score: float | None = None
    original_stderr: float | None = None
    flips: float | None = None
    lost: float | None = None
    gained: float | None = None
    difference_stderr: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, fit for JSON."""
        return asdict(self)


def evaluate_tasks(
    checkpoint: str | Path,
    tasks: Sequence[str],
    *,
    original: str | Path | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch: int = 8,
    device: torch.device | str | None = None,
    progress: Progress = no_progress,
) -> list[TaskScore]:
    """Scores of a model on tasks of lm-evaluation-harness, and which answers differ from the original's.

    Args:
        checkpoint: Any model, locked or not, see `convert.use.opened`.
        tasks: Names of tasks, groups and tags of the harness or patterns such as arc_*.
        original: What it is compared with, None for nothing.
        include_path: A folder with more tasks. The harness's own are looked through where these do not suffice.
        limit: The first so many questions of each task; None for all.
        shots: Worked examples before each question; None as the task says.
        batch: Sequences in a pass.
        device: Where the models run, None for the best there is.
        progress: Called with (what is being done, done, total).

    Returns:
        One for each task, metric and filter, in the harness's order.

    Raises:
        DLRError: Where the harness is not installed, a task is not known or its data cannot be had, all before a model
            is loaded; and on a model that cannot be loaded or has no language-model head.
    """
    _check(tasks, include_path, limit, shots, batch)
    progress("looking for the tasks", 0, 1)
    with _quiet():
        loaded = _load(tasks, None if include_path is None else Path(include_path))
        with ExitStack() as stack:
            models = {
                side: (source, *stack.enter_context(opened(source, device=device)))
                for side, source in (("locked model", checkpoint), ("original", original))
                if source is not None
            }
            for source, model, tokenizer in models.values():
                _check_model(source, model, tokenizer)
            results = [
                _run(loaded, model, tokenizer, limit, shots, batch, partial(progress, f"asking the {side}"))
                for side, (_, model, tokenizer) in models.items()
            ]
    return list(_scores(*results))


def _check(
    tasks: Sequence[str], include_path: str | Path | None, limit: int | None, shots: int | None, batch: int
) -> None:
    """Raises DLRError on what can be told before anything is imported."""
    for module in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise DLRError(f"tasks need {module}, which is not installed: pip install 'dlr-lock[eval]'")
    if not tasks or not all(tasks):
        raise DLRError("no task is named; names are separated by commas, such as arc_easy,hellaswag")
    if include_path is not None and not Path(include_path).is_dir():
        raise DLRError(f"--include-path {include_path} is no folder")
    for name, value, least in (("--limit", limit, 1), ("--shots", shots, 0), ("--batch", batch, 1)):
        if value is not None and value < least:
            raise DLRError(f"{name} must be {least} or more, not {value}")


def _load(names: Sequence[str], include_path: Path | None) -> list[Any]:
    """Tasks and groups by name with their data, each of which has words for its first question."""
    from lm_eval.tasks import TaskManager

    def manager(**sources: Any) -> Any:
        return TaskManager(include_path=None if include_path is None else str(include_path), **sources)

    # The harness's own are some ten thousand files: 15 s of a quiet core.
    found = manager(include_defaults=False)
    if not all(_is_whole(name, found.task_index) for name in names):
        found = manager()
    matches = [match for name in names for match in _matches(name, found)]
    loaded = []
    for name in dict.fromkeys(matches):
        try:
            one = found.load([name])
            for task in one["tasks"].values():
                _check_task(task)
            loaded += list(one["groups"].values())[:1] or list(one["tasks"].values())
        except DLRError:
            raise
        except (
            Exception
        ) as error:  # the hub, the network, the task's own code: each has exceptions of its own
            raise DLRError(f"the task {name} cannot be used: {first_line(error)}") from error
    try:
        found.load(loaded)  # all together
    except ValueError as error:
        raise DLRError(f"these tasks do not go together: {first_line(error)}") from error
    return loaded


def _is_whole(name: str, index: dict[str, Any]) -> bool:
    """Whether an index has what is called so, with all that it is made of."""
    entry = index.get(name)
    if entry is None or entry.kind.name == "TAG":  # of which the harness may have more
        return False
    parts = entry.cfg.get("task", []) if entry.kind.name == "GROUP" else []
    return all(isinstance(part, str) and _is_whole(part, index) for part in parts)


def _matches(name: str, manager: Any) -> list[str]:
    if name in manager.task_index:
        return [name]
    if found := manager.match_tasks([name]):
        return found
    close = difflib.get_close_matches(name, manager.all_tasks, n=3)
    hint = f"; is it {' or '.join(close)}?" if close else "; `lm_eval ls tasks` names them all"
    raise DLRError(f"unknown task {name!r}{hint}")


def _check_task(task: Any) -> None:
    """Raises DLRError on a task that cannot be run here, and whatever its own code does on its first question."""
    if getattr(task, "UNSAFE_CODE", False):
        raise DLRError(
            f"the task {task.task_name} runs what a model writes: use lm_eval itself, in a sandbox"
        )
    if getattr(task, "MULTIMODAL", False):
        raise DLRError(f"the task {task.task_name} is not of text alone")
    shots = task.get_config("num_fewshot")
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=1)
    task.set_config(key="num_fewshot", value=shots)


def _check_model(
    source: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    if not predicts_next(model):
        raise DLRError(f"{source}, a {type(model).__name__}, has no language-model head: it cannot do tasks")
    if tokenizer is None:
        raise DLRError(f"{source} has no tokenizer, so it cannot do tasks")


def _run(
    tasks: list[Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    limit: int | None,
    shots: int | None,
    batch: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """What the harness says of one model, with every answer."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):
        """The harness's own model; it is handed a part of the requests after another, and says how far it is."""

        def _in_parts(self, answer: Callable[..., list[Any]], requests: Sequence[Any]) -> list[Any]:
            answers: list[Any] = []
            for begin in range(0, len(requests), _SLICE):
                progress(begin, len(requests))
                answers += answer(requests[begin : begin + _SLICE], disable_tqdm=True)
            progress(len(requests), len(requests))
            return answers

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._in_parts(super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._in_parts(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._in_parts(super().generate_until, requests)

    try:
        return simple_evaluate(
            Watched(pretrained=model, tokenizer=tokenizer, batch_size=batch),
            tasks=tasks,
            num_fewshot=shots,
            limit=limit,
            log_samples=True,
        )
    except (ValueError, KeyError, AssertionError) as error:  # such as more shots than there are examples
        raise DLRError(f"lm_eval cannot run these tasks: {first_line(error)}") from error


def _scores(locked: dict[str, Any], original: dict[str, Any] | None = None) -> Iterator[TaskScore]:
    for task, values in locked["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            others = {} if original is None else original["results"][task]
            score = TaskScore(
                task=task,
                metric=metric,
                filter=kind,
                questions=sum(locked["n-samples"][leaf]["effective"] for leaf in _leaves(task, locked)),
                shots=locked["n-shot"].get(task),
                higher_is_better=locked["higher_is_better"].get(task, {}).get(metric),
                score=_number(value),
                stderr=_number(values.get(f"{metric}_stderr,{kind}")),
                original_score=_number(others.get(key)),
                original_stderr=_number(others.get(f"{metric}_stderr,{kind}")),
            )
            yield score if original is None else _with_flips(score, locked, original)


def _with_flips(score: TaskScore, locked: dict[str, Any], original: dict[str, Any]) -> TaskScore:
    ours, theirs = (_answers(score, results) for results in (locked, original))
    if ours.keys() != theirs.keys():
        raise DLRError(f"the two models were not asked the same questions of {score.task}")
    right = [(ours[question], theirs[question]) for question in ours]
    if not right or any(answer not in (0, 1) for pair in right for answer in pair):
        return score
    n = len(right)
    means = (sum(ours.values()) / n, sum(theirs.values()) / n)
    if any(
        value is None or not math.isclose(value, mean, abs_tol=1e-9)
        for value, mean in zip((score.score, score.original_score), means, strict=True)
    ):
        return score  # another figure than the share of right answers, such as a correlation
    lost, gained = (sum(pair == way for pair in right) / n for way in ((0, 1), (1, 0)))
    spread = (
        lost + gained - (gained - lost) ** 2
    )  # of +1 for an answer gained, -1 for one lost, 0 for the rest
    figures = {"flips": lost + gained, "lost": lost, "gained": gained}
    error = math.sqrt(max(0.0, spread) / (n - 1)) if n > 1 else None
    return TaskScore(**score.to_dict() | figures | {"difference_stderr": error})


def _answers(score: TaskScore, results: dict[str, Any]) -> dict[tuple[Any, ...], Any]:
    """What the metric says of every question of a task or group."""
    return {
        (leaf, sample["doc_id"], sample["doc_hash"], sample["prompt_hash"]): sample[score.metric]
        for leaf in _leaves(score.task, results)
        for sample in results["samples"][leaf]
        if sample["filter"] == score.filter and score.metric in sample
    }


def _leaves(task: str, results: dict[str, Any]) -> list[str]:
    """The tasks that a group is made of, or the task."""
    children = results["group_subtasks"].get(task)
    return [task] if not children else [leaf for child in children for leaf in _leaves(child, results)]


def _number(value: Any) -> float | None:
    """The harness writes N/A where it gives no standard error."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness's warnings, such as that a model was handed over and not a name, are not for our users."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
