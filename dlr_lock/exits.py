"""How the command line ends: exit status 2 and one line on standard error for all that the user can correct."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from .common.options import flag, old_name
from .convert.config import GONE, RENAMED

_LISTENS = 1.0  # seconds between two looks
_PATIENCE = 5.0  # seconds

STOPS = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def what_is_kept() -> Iterator[None]:
    """An interruption that says what is kept; typer would drop the words."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not str(stop):
            raise
        fail(str(stop))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process in one line where the block fails by what the user can correct."""
    try:
        yield
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted; nothing was written")
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left: no more to say to anyone
        sys.exit(0)
    except Exception as error:
        from .common.errors import DLRError

        if hasattr(error, "format_message"):  # click's own errors, which newer typers carry a copy of
            written = str(getattr(error, "option_name", ""))
            command = getattr(getattr(error, "ctx", None), "info_name", "")
            renamed, gone = (
                (RENAMED, GONE)
                if command in ("convert", "plan")
                else ({}, GONE if command == "bench" else {})
            )
            name = written.lstrip("-").replace("-", "_")
            hint = "; the engine's own flags follow after --" if written and command == "serve" else ""
            fail(old_name(name, written, renamed, gone, flag) or error.format_message() + hint)
        if not isinstance(error, DLRError | MemoryError) and "out of memory" not in str(error):
            raise
        fail(str(error) or "out of memory: use a smaller --batch or --max-memory")


def fail(message: str) -> NoReturn:
    """Ends the process: the message on standard error, in one line, and exit status 2.

    Of several processes of one run the first to fail says why.
    """
    from .convert.parallel.ranks import may_tell, part, several

    line = f"dlr-lock: {' '.join(message.split())}"
    if not several():
        print(line, file=sys.stderr)
        sys.exit(2)
    if threading.current_thread() is threading.main_thread():
        for name in (*STOPS, "SIGINT"):  # the launcher's, which ends the others, too
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if may_tell(message):
        print(line, file=sys.stderr, flush=True)
    part()
    os._exit(2)  # what is left of the connections may wait for processes that are gone


def end_with_the_others() -> None:
    """From now on this process ends where another one has said why all do, or a signal ends it, even while it waits in
    a call of torch.distributed: such a call hears no signal, and gloo's may wait for ever for a process that is gone.

    It has five seconds to end by itself, which leaves nothing behind.
    """
    usual = sys.unraisablehook
    # A signal that meets a destructor is lost to the program; the listener still ends it, and no traceback is owed.
    sys.unraisablehook = lambda lost: None if isinstance(lost.exc_value, KeyboardInterrupt) else usual(lost)
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(heard,), daemon=True).start()


def _listen(heard: int) -> None:
    from .convert.parallel.ranks import LOST, told

    while not select.select([heard], [], [], _LISTENS)[0] and not told():
        pass
    time.sleep(_PATIENCE)
    fail(LOST)


def interrupt(signum: int, frame: Any) -> None:
    """A signal's handler: ends the work as Ctrl-C does."""
    raise KeyboardInterrupt
