"""How long work says how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (what is being done, done, total)
Count = Callable[[int, int], None]  # (done, total), of one thing


def no_progress(what: str, done: int, total: int) -> None:
    """A `Progress` that says nothing."""


def no_count(done: int, total: int) -> None:
    """A `Count` that says nothing."""
