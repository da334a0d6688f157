"""Choices as fields of a dataclass, which a command line is made from: default, type and help stand in one place."""

from collections.abc import Iterable, Mapping
from dataclasses import field, fields
from typing import Any

from .errors import DLRError


def option(default: Any, help: str) -> Any:
    """A field of a configuration that the command line offers, with this help."""
    return field(default=default, metadata={"help": help})


def flag(name: str) -> str:
    """A field's option on the command line: `train_tokens` is --train-tokens."""
    return f"--{name.replace('_', '-')}"


def check_names(given: Iterable[str], config: type, renamed: Mapping[str, str]) -> None:
    """Raises DLRError on a name that is no field of a configuration, with the line about it in `renamed`, if any."""
    known = [f.name for f in fields(config)]
    for name in given:
        if name not in known:
            raise DLRError(renamed.get(name) or f"unknown option {name!r}; one of {', '.join(known)}")


def help_of(config: type, name: str) -> str:
    """The help of a field."""
    return next(f.metadata["help"] for f in fields(config) if f.name == name)
