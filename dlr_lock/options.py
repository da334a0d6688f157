"""Command-line options made from a configuration's fields, so that a default and a help stand in one place."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer
from rich.markup import escape

from .common.errors import DLRError
from .common.options import flag, with_default


def choice(help: str, shown: str | None = None, *names: str) -> Any:
    """An option of a command.

    Args:
        help: What it is; brackets in it are no markup.
        shown: What the default comes to, where it is no value that typer shows by itself.
        names: How it is written, where not as its parameter.
    """
    return typer.Option(*names, help=escape(with_default(help, shown)))


def options_of(config: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command takes an option for each field of the dataclass `config`, as keyword arguments.

    Fields are those that `common.options.option` made. A field of several types becomes an option of text; one that
    the command has a parameter for is that parameter.
    """
    hints = get_type_hints(config)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        made = [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=f.default,
                annotation=Annotated[_type(hints[f.name]), choice(f.metadata["help"], f.metadata["shown"])],
            )
            for f in fields(config)
            if f.name not in own.parameters
        ]

        @wraps(command)
        def run(**arguments: Any) -> None:
            command(**arguments)

        # The last of its own, --json, stays the last.
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*kept[:-1], *made, *kept[-1:])]
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _type(hint: Any) -> Any:
    """What the command line takes for a field: its type, or text where it may be of several."""
    several = [kind for kind in getattr(hint, "__args__", ()) if kind is not type(None)]
    return str | None if len(several) > 1 else hint


def one_of(context: typer.Context, ways: dict[str, tuple[str, ...]]) -> None:
    """Raises DLRError unless one of the options was given, and with it none that belongs to another."""

    def given(name: str) -> bool:
        return getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"

    chosen = [name for name in ways if given(name)]
    if len(chosen) != 1:
        raise DLRError(f"give either {' or '.join(flag(name) for name in ways)}")
    for way, own in ways.items():
        for name in own:
            if way != chosen[0] and given(name):
                raise DLRError(f"{flag(name)} belongs to {flag(way)}, not to {flag(chosen[0])}")
