"""Choices as fields of a dataclass, which a command line is made from: default, type and help stand in one place."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields
from typing import Any

from .errors import DLRError


def option(default: Any, help: str, shown: str | None = None) -> Any:
    """A field of a configuration that the command line offers.

    Args:
        default: The field's.
        help: What it is, in a sentence.
        shown: What the default comes to, in words, where it is None.
    """
    return field(default=default, metadata={"help": help, "shown": shown})


def with_default(help: str, shown: str | None) -> str:
    """A help that ends with the default; the command line writes those that are values itself."""
    return help if shown is None else f"{help}  [default: {shown}]"


def by_name(choices: Mapping[str, Any], name: str) -> str:
    """What each of several named choices has in a field, "quick 4; full 6"; once where that is the same."""
    values = {key: getattr(choice, name) for key, choice in choices.items()}
    words = {key: value if isinstance(value, str) else f"{value:,}" for key, value in values.items()}
    one = set(words.values())
    return one.pop() if len(one) == 1 else "; ".join(f"{key} {value}" for key, value in words.items())


def known_name(given: str, names: Iterable[str], what: str) -> str:
    """The one of `names` that a user wrote, in whatever case.

    Raises:
        DLRError: Where it is none of them.
    """
    names = list(names)
    same = {name.casefold(): name for name in names}
    if (found := same.get(str(given).strip().casefold())) is None:
        raise DLRError(f"unknown {what} {given!r}; one of {', '.join(names)}")
    return found


def flag(name: str) -> str:
    """A field's option on the command line: `train_tokens` is --train-tokens."""
    return f"--{name.replace('_', '-')}"


def check_names(
    given: Iterable[str], config: type, renamed: Mapping[str, str] = {}, gone: Mapping[str, str] = {}
) -> None:
    """Looks whether choices are fields of a configuration.

    Args:
        given: The choices' names.
        config: The configuration, a dataclass.
        renamed: Today's names by those of earlier versions.
        gone: Why there is a name no longer.

    Raises:
        DLRError: On a name that is no field.
    """
    known = [f.name for f in fields(config)]
    for name in given:
        if name not in known:
            other = f"unknown option {name!r}; one of {', '.join(known)}"
            raise DLRError(old_name(name, name, renamed, gone) or other)


def old_name(
    name: str,
    written: str,
    renamed: Mapping[str, str],
    gone: Mapping[str, str],
    of: Callable[[str], str] = str,
) -> str | None:
    """What is said of a choice by a name of an earlier version; None where it is none.

    Args:
        name: The choice's name.
        written: The same as the user wrote it.
        renamed, gone: As for `check_names`.
        of: How today's name is written.
    """
    if name in gone:
        return f"{written} is gone: {gone[name]}"
    return f"{written} is now {of(renamed[name])}" if name in renamed else None


def help_of(config: type, name: str) -> str:
    """The help of a field."""
    return next(f.metadata["help"] for f in fields(config) if f.name == name)
