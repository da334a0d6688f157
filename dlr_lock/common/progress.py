"""How long work says how far it is: a callback, which may also want to know what a job is made of."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

Progress = Callable[[str, int, int], None]  # (what is being done, done, total)
Count = Callable[[int, int], None]  # (done, total), of one thing


@dataclass(frozen=True, slots=True)
class Phase:
    """One kind of work that a job still has before it.

    Attributes:
        name: What the progress's words begin with.
        work: All of it, in any unit that the phases of a job share; it counts only until the phase is measured.
        times: How often it is begun, each as long as the others.
    """

    name: str
    work: float
    times: int = 1


def expect(progress: Progress, phases: Sequence[Phase]) -> None:
    """Tells a progress that has a method of this name what is to come; of a phase told before, how much it is now."""
    if (told := getattr(progress, "expect", None)) is not None:
        told(phases)


def say(progress: Progress, sentence: str) -> None:
    """Tells a progress that has a method of this name what its user should know now."""
    if (told := getattr(progress, "say", None)) is not None:
        told(sentence)


@contextmanager
def shown(progress: Progress, what: str) -> Iterator[None]:
    """Work whose progress is only that it is done."""
    progress(what, 0, 1)
    yield
    progress(what, 1, 1)


def no_progress(what: str, done: int, total: int) -> None:
    """A `Progress` that says nothing."""


def no_count(done: int, total: int) -> None:
    """A `Count` that says nothing."""
