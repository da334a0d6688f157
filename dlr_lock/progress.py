"""Progress of long work, with the time left."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_QUIET = 15.0  # seconds between two lines where the output is no terminal


class Steps:
    """A progress callback `(what, done, total)`: one bar a step on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._step = ""
        self._began = self._spoke = 0.0

    def __enter__(self) -> "Steps":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._console.is_terminal:
            if what not in self._tasks or done == 0:
                self._tasks[what] = self._bars.add_task(what, total=total)
            self._bars.update(self._tasks[what], completed=done, total=total)
            return
        now = time.monotonic()
        if what != self._step:
            self._step, self._began, self._spoke = what, now, now
            self._console.print(f"{what} ...")
        elif now - self._spoke > _QUIET and 0 < done < total:
            self._spoke = now
            left = (now - self._began) * (total - done) / done
            self._console.print(f"  {100 * done // total}%, {left:.0f} s left")
