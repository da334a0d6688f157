"""Benchmark tasks on a locked model and its original: scores and flips are those of arithmetic by hand."""

import importlib.util
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
from local_task import CHOICES, QUESTIONS, label_of, write_task
from locked import lock_randomly
from tiny import save_tiny, tiny_model, tiny_tokenizer
from torch import nn

from dlr_lock.cli import main

harness = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("lm_eval", "accelerate")),
    reason="needs lm_eval and accelerate: pip install 'dlr-lock[eval]'",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    save_tiny("llama", folder / "source", initializer_range=0.3)
    torch.manual_seed(0)
    model = tiny_model("llama", initializer_range=0.3)
    lock_randomly(model)
    model.save_pretrained(folder / "out")
    tiny_tokenizer().save_pretrained(folder / "out")
    write_task(folder / "given")
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """The command line in this process: (status, standard output, last line of standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(
            sys, "argv", ["dlr-lock", *(str(a).replace("{}", str(folder)) for a in arguments)]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capfd.readouterr()
        return ended.value.code, shown.out, (shown.err.strip().splitlines() or [""])[-1]

    return run


@torch.no_grad()
def answers(model: nn.Module) -> list[bool]:
    """Whether the model finds the right choice likeliest, question by question."""
    tokenizer = tiny_tokenizer()
    right = []
    for number, question in enumerate(QUESTIONS):
        chances = []
        for choice in CHOICES:
            ids = tokenizer(f"{question} {choice}", return_tensors="pt")["input_ids"]
            start = len(tokenizer(question)["input_ids"])
            log_p = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            chances.append(log_p.gather(-1, ids[0, 1:, None])[start - 1 :].sum().item())
        right.append(chances.index(max(chances)) == label_of(number))
    return right


@harness
def test_scores_errors_and_flips_are_those_by_hand(run, folder: Path) -> None:
    from dlr_lock import load

    ours, theirs = answers(load(folder / "out")), answers(tiny_model("llama", initializer_range=0.3))
    arguments = ("eval", "{}/out", "--tasks", "rivers", "--include-path", "{}/given", "--device", "cpu")
    status, out, err = run(*arguments, "--original", "{}/source", "--json")
    assert status == 0, err
    (row,) = json.loads(out)["tasks"]
    n = len(QUESTIONS)
    assert (row["task"], row["metric"], row["filter"], row["questions"]) == ("rivers", "acc", "none", n)
    assert (row["shots"], row["higher_is_better"]) == (0, True)
    for name, right in (("", ours), ("original_", theirs)):
        assert row[f"{name}score"] == pytest.approx(sum(right) / n)
        assert row[f"{name}stderr"] == pytest.approx(statistics.stdev(map(float, right)) / math.sqrt(n))
    pairs = list(zip(ours, theirs, strict=True))
    lost, gained = pairs.count((False, True)) / n, pairs.count((True, False)) / n
    assert lost > 0 and gained > 0, "the models differ too little to test flips"
    assert (row["lost"], row["gained"]) == pytest.approx((lost, gained))
    assert row["flips"] == pytest.approx(lost + gained)
    differences = [float(o) - float(t) for o, t in pairs]
    assert row["difference_stderr"] == pytest.approx(statistics.stdev(differences) / math.sqrt(n))

    status, out, _ = run(*arguments, "--limit", 7)
    assert status == 0 and "rivers" in out and f"{sum(ours[:7]) / 7:.4f} ±" in out
    assert "answers flipped" not in out and " 7 " in out  # nothing to compare with


@harness
def test_several_tasks_and_a_group_of_them_are_pooled(run, folder: Path) -> None:
    given = folder / "several"
    for name in ("first", "second"):
        write_task(given, name)
    (given / "both.yaml").write_text(
        "group: both\ntask: [first, second]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    )
    status, out, err = run(
        "eval", "{}/out", "--tasks", "both", "--include-path", given, "--original", "{}/source", "--json"
    )
    assert status == 0, err
    rows = {row["task"]: row for row in json.loads(out)["tasks"]}
    assert set(rows) == {"both", "first", "second"}
    assert rows["both"]["questions"] == 2 * len(QUESTIONS)
    assert rows["both"]["flips"] == rows["first"]["flips"] == rows["second"]["flips"] > 0


TASKS = (
    "eval",
    "{}/nowhere",
    "--tasks",
    "rivers",
    "--include-path",
    "{}/given",
)  # no model is there to be loaded


@harness
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        # looks through all of the harness's own tasks: 15 s
        (
            ("eval", "{}/nowhere", "--tasks", "riverz", "--include-path", "{}/given"),
            "unknown task 'riverz'; is it",
        ),
        (("eval", "{}/nowhere", "--tasks", "rivers", "--include-path", "{}/absent"), "absent is no folder"),
        ((*TASKS, "--limit", "0"), "--limit must be 1 or more"),
        ((*TASKS, "--shots", "-1"), "--shots must be 0 or more"),
        (("eval", "{}/nowhere", "--tasks", ",", "--include-path", "{}/given"), "no task is named"),
        (TASKS, "nowhere"),
    ],
)
def test_mistakes_end_in_one_line_before_a_model_is_loaded(
    arguments: tuple[str, ...], says: str, run
) -> None:
    status, out, line = run(*arguments)
    assert status == 2 and out == "" and line.startswith("dlr-lock: ") and says in line


@harness
def test_a_task_that_does_not_fit_its_data_is_named(run, folder: Path) -> None:
    broken = write_task(folder / "broken", "broken")
    text = (broken / "broken.yaml").read_text()
    (broken / "broken.yaml").write_text(text.replace("{{question}}", "{{riddle}}"))
    status, _, line = run("eval", "{}/nowhere", "--tasks", "broken", "--include-path", broken)
    assert status == 2 and "the task broken cannot be used" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give either --text or --tasks"),
        (("--text", "x.txt", "--tasks", "rivers"), "give either --text or --tasks"),
        (("--text", "x.txt", "--limit", "3"), "--limit belongs to --tasks, not to --text"),
        (("--tasks", "rivers", "--skip", "3"), "--skip belongs to --text, not to --tasks"),
    ],
)
def test_a_text_or_tasks_each_with_its_own_options(arguments: tuple[str, ...], says: str, run) -> None:
    status, _, line = run("eval", "{}/out", *arguments)
    assert status == 2 and says in line


def test_what_is_missing_is_named(run, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a)
    )
    status, _, line = run("eval", "{}/nowhere", "--tasks", "rivers")
    assert status == 2 and "tasks need lm_eval" in line
    assert "pip install 'dlr-lock[eval]'" in line
