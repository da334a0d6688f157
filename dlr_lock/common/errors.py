"""The one exception that means: the user can fix this; and how errors of others are told in one line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

_LONGEST = 300  # characters of a line that is told


class DLRError(Exception):
    """A mistake that the user can correct.

    The message is one line: what was wrong and what to do about it. The command line prints it and exits
    with status 2; a library caller catches it by this name.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, cut to 300 characters; its type where none does."""
    lines = (line.strip() for line in str(error).splitlines())
    text = next((line for line in lines if line), type(error).__name__)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def typed_line(error: BaseException) -> str:
    """`first_line` behind the error's type: "ValueError: no such plan"."""
    kind, text = type(error).__name__, first_line(error)
    return text if text == kind else f"{kind}: {text}"


class Failing(Protocol):
    """A row of results that can say why it has none."""

    accurate: bool
    error_message: str | None


@contextmanager
def capture_error(row: Failing, check: Callable[[Exception], object] = lambda error: None) -> Iterator[None]:
    """What fails in the block becomes the row's message, unless `check` raises on it."""
    try:
        yield
    except Exception as error:
        check(error)
        row.accurate, row.error_message = False, typed_line(error)
