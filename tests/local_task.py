"""A task for lm-evaluation-harness of a few questions, all of it in two files."""

import json
from pathlib import Path

CHOICES = ("A", "B", "C", "D")  # as long, or the shortest is always the likeliest
SUBJECTS = ("river", "model", "token", "people", "sea", "hill", "moon", "gate")
VERBS = ("runs to", "says", "reads", "gives", "watches")
QUESTIONS = [f"The {subject} {verb}" for subject in SUBJECTS for verb in VERBS]


def label_of(number: int) -> int:
    """The choice that is right for a question."""
    return number * 7 % len(CHOICES)


def write_task(folder: Path, name: str = "rivers") -> Path:
    """Writes the task into `folder`, which is made; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": question, "label": label_of(n)} for n, question in enumerate(QUESTIONS)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(f"""
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder / f"{name}.jsonl"}}}
  cache_dir: {folder / "cache"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: {json.dumps(list(CHOICES))}
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
""")
    return folder
