"""Progress of long work, with one time left for the whole job."""

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from .common.progress import Phase

_TRUSTED = 0.2  # share of a phase from which on its own rate counts alone, and not that of all work so far
_KNOWN = 0.3  # share of the work to come that must be of phases already measured, before a time left is given
_MEASURED = 1.0  # seconds of a phase that make it measured
_TELLING = 0.02  # share of all work that a phase has at least whose rate tells something of the others


class TimeLeft:
    """The seconds that a job still takes, by what its phases took so far in this run.

    A phase that has not begun is reckoned by its work and the rate of all that was done. One that has begun moves to
    its own rate as it goes on, so that the time left never jumps.

    Args:
        clock: Seconds, forward only.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phases: dict[str, Phase] = {}
        self._seconds: dict[str, float] = {}
        self._begun: dict[str, int] = {}
        self._at: dict[str, tuple[str, int, int]] = {}  # a phase's last (what, done, total)
        self._last = clock()
        self._given = False

    def expect(self, phases: Sequence[Phase]) -> None:
        """What is to come; a phase of a name that is known is as large as this one says from now on."""
        for phase in phases:
            self._phases[phase.name] = phase
            self._seconds.setdefault(phase.name, 0.0)
            self._begun.setdefault(phase.name, 0)
        self._last = self._clock()

    def at(self, what: str, done: int, total: int) -> None:
        """The job is so far. The time since the last call counts for the phase of this one."""
        now = self._clock()
        passed, self._last = now - self._last, now
        name = next((n for n in self._phases if what.startswith(n)), None)
        if name is None:
            return
        before = self._at.get(name)
        if before is None or before[0] != what or done < before[1]:
            self._begun[name] += 1
        self._at[name] = what, done, max(1, total)
        self._seconds[name] += passed

    @property
    def seconds(self) -> float | None:
        """None where too little of what is to come has been measured."""
        done = {name: phase.work * self._share(name) for name, phase in self._phases.items()}
        # A text is read in seconds that have next to no FLOPs: at that rate a job of 90 s was said to take 83 min.
        least = _TELLING * sum(phase.work for phase in self._phases.values())
        telling = [name for name, phase in self._phases.items() if done[name] and phase.work >= least]
        spent = sum(self._seconds[name] for name in telling)
        if not spent:
            return None
        usual = spent / sum(done[name] for name in telling)
        left = known_work = all_work = 0.0
        for name, phase in self._phases.items():
            rest, own = phase.work - done[name], self._seconds[name]
            rate = usual
            if done[name]:
                trust = min(1.0, self._share(name) / _TRUSTED)
                rate = trust * own / done[name] + (1 - trust) * usual
            left += rest * rate
            all_work += rest
            if own >= _MEASURED and done[name]:
                known_work += rest
        # Once it was given it stays: a time that comes and goes is a jump, too.
        self._given = self._given or not all_work or known_work >= _KNOWN * all_work
        return left if self._given else None

    def _share(self, name: str) -> float:
        begun, times = self._begun[name], max(1, self._phases[name].times)
        if not begun:
            return 0.0
        _, done, total = self._at[name]
        return min(1.0, (begun - 1 + done / total) / times)


def left_words(seconds: float) -> str:
    """Such as "about 40 s", "about 12 min" or "about 3.5 h"."""
    if seconds < 90:
        return f"about {max(10, 10 * round(seconds / 10))} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


class Steps:
    """A progress callback `(what, done, total)`: on a terminal what is being done and the whole job, elsewhere a line
    a phase. Where the job said what it is made of, either has the time that all of it still takes."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._left = TimeLeft(clock)
        self._clock, self._began = clock, clock()
        self._bars = Progress(
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=16),
            TextColumn("{task.percentage:>3.0f}%"),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._phase = self._bars.add_task("", total=1)
        self._job = self._bars.add_task("the whole job", total=1, visible=False)
        self._said: set[str] = set()

    def __enter__(self) -> "Steps":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def expect(self, phases: Sequence[Phase]) -> None:
        """See `common.progress.expect`."""
        self._left.expect(phases)

    def say(self, sentence: str) -> None:
        """See `common.progress.say`."""
        self._console.print(sentence, markup=False)

    def __call__(self, what: str, done: int, total: int) -> None:
        self._left.at(what, done, total)
        left = self._left.seconds
        if not self._console.is_terminal:
            if what not in self._said:
                self._said.add(what)
                rest = "" if left is None else f"; {left_words(left)} left of the whole job"
                self._console.print(f"{what} ...{rest}", markup=False, soft_wrap=True)
            return
        self._bars.update(self._phase, description=escape(what), completed=done, total=max(1, total))
        if left is not None:
            passed = self._clock() - self._began
            words = f"the whole job, {left_words(left)} left"
            self._bars.update(
                self._job, description=words, completed=passed, total=passed + left, visible=True
            )
