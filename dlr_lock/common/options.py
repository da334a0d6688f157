"""Choices as fields of a dataclass, which a command line is made from: default, type and help stand in one place."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields
from typing import Any

from .errors import DLRError


def option(default: Any, help: str) -> Any:
    """A field of a configuration that the command line offers, with this help."""
    return field(default=default, metadata={"help": help})


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
