"""One time left for a whole job, a line a phase in a pipe, and what a resumed job found: as a user sees them."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from tiny import save_tiny

from dlr_lock import convert_model
from dlr_lock.common.progress import Phase
from dlr_lock.convert.data import english_topics
from dlr_lock.progress import Steps, TimeLeft, left_words

# name, how often, seconds of one, work said beforehand for all: wrong by up to three times, as guesses can be
JOB = (
    ("activations", 6, 4.0, 24.0),
    ("distilling", 6, 60.0, 360.0),
    ("end-to-end", 1, 900.0, 300.0),
    ("measuring", 1, 20.0, 60.0),
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def ticks(clock: Clock) -> Iterator[tuple[str, int, int, float]]:
    """A job as it goes on: (what, done, total, seconds that are truly left)."""
    order = [(n, s, i) for i in range(6) for n, _, s, _ in JOB[:2]] + [(n, s, 0) for n, _, s, _ in JOB[2:]]
    total = sum(seconds for _, seconds, _ in order)
    for name, seconds, number in order:
        for done in range(101):
            clock.now += seconds / 100 if done else 0.0
            yield f"{name} part {number}" if name == "distilling" else name, done, 100, total - clock.now


def test_the_time_left_is_the_whole_jobs_and_never_jumps() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    left.expect([Phase(name, work, times) for name, times, _, work in JOB])
    before: tuple[float, float] | None = None
    given = 0
    for what, done, total, truth in ticks(clock):
        left.at(what, done, total)
        if (now := left.seconds) is None:
            continue
        given += 1
        if truth > 60:
            assert 1 / 4 < now / truth < 4, (what, done, now, truth)
        if before is not None:  # it moves by what passed, and by a fifth of itself at most
            assert abs(before[1] - (clock.now - before[0]) - now) < before[1] / 5 + 30, (what, before, now)
        before = clock.now, now
    assert given > 1000 and before is not None and before[1] < 1


def test_nothing_is_given_before_something_is_measured() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    left.expect([Phase("activations", 1.0), Phase("distilling", 99.0)])
    clock.now += 5
    left.at("activations", 1, 1)
    assert left.seconds is None  # a hundredth of the work says little of the rest


def test_what_is_slow_for_its_work_says_nothing_of_the_rest() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    left.expect([Phase("text", 0.001), Phase("activations", 50.0), Phase("distilling", 50.0)])
    for what, done, seconds in (("text", 0, 0.0), ("text", 1, 20.0), ("activations", 0, 0.5)):
        clock.now += seconds
        left.at(what, done, 1)
        assert left.seconds is None
    for done in range(1, 51):
        clock.now += 0.5
        left.at("activations", done, 50)
        assert left.seconds is not None and 20 < left.seconds < 120
    assert left.seconds < 40


def test_in_a_pipe_there_is_a_line_a_phase() -> None:
    out, clock = io.StringIO(), Clock()
    with Steps(Console(file=out, width=80), clock) as steps:
        steps.expect([Phase(name, work, times) for name, times, _, work in JOB])
        for what, done, total, _ in ticks(clock):
            steps(what, done, total)
    lines = out.getvalue().splitlines()
    assert [re.sub(r" \.\.\..*", "", line) for line in lines] == [
        "activations", *(f"distilling part {n}" for n in range(6)), "end-to-end", "measuring",
    ]  # fmt: skip
    assert re.search(r"about \d+ min left of the whole job$", lines[3])


def test_on_a_terminal_there_are_two_lines_whatever_the_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out, clock = io.StringIO(), Clock()
    with Steps(Console(file=out, width=80, force_terminal=True), clock) as steps:
        steps.expect([Phase(name, work, times) for name, times, _, work in JOB])
        for what, done, total, _ in ticks(clock):
            steps(f"{what} of model.language_model.layers.[11].a_very_long_name.feed_forward", done, total)
        steps._bars.refresh()
    frames = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", out.getvalue()).split("\r")
    assert all(len(line) <= 80 for frame in frames for line in frame.splitlines())
    assert "the whole job" in out.getvalue() and len(frames[-1].splitlines()) <= 2


@pytest.mark.parametrize(
    ("seconds", "words"), [(2, "about 10 s"), (44, "about 40 s"), (95, "about 2 min"), (6_000, "about 1.7 h")]
)
def test_a_time_in_words(seconds: float, words: str) -> None:
    assert left_words(seconds) == words


class Told:
    """A progress that stops a conversion at a place, and hears what is said."""

    def __init__(self, stop: str = "never") -> None:
        self.stop, self.said, self.phases = stop, [], {}  # type: ignore[var-annotated]

    def __call__(self, what: str, done: int, total: int) -> None:
        if what.startswith(self.stop):
            raise KeyboardInterrupt

    def expect(self, phases: list[Phase]) -> None:
        self.phases |= {phase.name: phase for phase in phases}

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


def test_a_resumed_conversion_says_what_it_found_and_expects_less(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    (tmp_path / "topics.txt").write_text(english_topics()[:40_000], encoding="utf-8")
    choices = {
        "data": str(tmp_path / "topics.txt"), "tokens": 2048, "train_tokens": 4096, "batch": 256, "depth": 3,
        "rank": 16, "device": "cpu", "redistill": 0.0,
    }  # fmt: skip
    first = Told("distilling model.layers.1.mlp")
    with pytest.raises(KeyboardInterrupt):
        convert_model(source, tmp_path / "out", progress=first, **choices)
    assert first.said == [] and first.phases["distilling"].times == 2
    again = Told()
    report = convert_model(source, tmp_path / "out", progress=again, **choices)
    (words,) = again.said
    assert "keeps 1 of 2 modules" in words and "going on with model.layers.1.mlp" in words
    assert again.phases["distilling"].times == 1 and len(report.modules) == 2


def test_sampling_on_a_cpu_is_said_to_be_slow_before_it_begins(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    told = Told("calibration text")
    with pytest.raises(KeyboardInterrupt):
        convert_model(source, tmp_path / "out", progress=told, device="cpu", tokens=1024)
    assert len(told.said) == 1 and "takes longer than everything else" in told.said[0]
