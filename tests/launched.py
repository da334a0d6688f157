"""Several processes of one run, as torchrun starts them and ends them: with torch.distributed's environment variables,
the store by which they find one another, and an end to all once one has failed.

They fork from a server that has imported the program once, so that a run of a tiny model takes seconds.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import distributed

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "dlr_lock.cli",
        "dlr_lock.convert.pipeline",
        "dlr_lock.runtime.quantizer",
        "transformers.models.llama",
        "launched",
    ]
)
PATIENCE = 120.0  # seconds until a run that does not end is called one that hangs


class Launched:
    """The processes of one run.

    Args:
        size: How many.
        work: What each does: a function of a module.
        *arguments: What it is called with.
        log: A folder: what process k writes to either stream is in its file k.
        alone: Whether they have the variables and no more: the first one has the store, and nobody ends the others.
    """

    def __init__(
        self, size: int, work: Callable[..., None], *arguments: Any, log: Path, alone: bool = False
    ) -> None:
        self._store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self._store.port
        if alone:
            del self._store
        self._alone = alone
        log.mkdir(exist_ok=True)
        for file in log.iterdir():
            file.unlink()
        self._log = log
        self.processes = []
        for rank in range(size):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            variables = {name: str(value) for name, value in own.items()}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            if not alone:
                variables["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            process = _SERVER.Process(target=_run, args=(variables, log / str(rank), work, arguments))
            process.start()
            self.processes.append(process)

    def kill(self, rank: int) -> None:
        """kill -9."""
        if (pid := self.processes[rank].pid) is not None and self.processes[rank].is_alive():
            os.kill(pid, signal.SIGKILL)

    def await_words(self, words: str = "") -> None:
        """Waits until the first one says something, these words or any: all have found one another then."""
        until = time.monotonic() + PATIENCE
        while not (said := self.said()[0]) or words not in said:
            assert time.monotonic() < until
            time.sleep(0.01)

    def ended(self) -> list[int | None]:
        """Waits for all; their exit statuses, negative for a signal. Fails where they do not end."""
        until = time.monotonic() + PATIENCE
        while any(p.is_alive() for p in self.processes) and time.monotonic() < until:
            if not self._alone and any(p.exitcode for p in self.processes):
                for process in self.processes:
                    process.terminate()
                self._alone = True  # once
            time.sleep(0.05)
        hung = [number for number, process in enumerate(self.processes) if process.is_alive()]
        for number in hung:
            os.kill(self.processes[number].pid or 0, signal.SIGUSR1)  # where it is
        time.sleep(bool(hung))
        for number in hung:
            self.kill(number)
        assert not hung, f"processes {hung} did not end: {self.said()}"
        return [process.exitcode for process in self.processes]

    def said(self) -> list[str]:
        """What each wrote."""
        files = [self._log / str(rank) for rank in range(len(self.processes))]
        return [file.read_text(encoding="utf-8") if file.exists() else "" for file in files]

    def lines(self) -> list[str]:
        """The lines in which the program says why it ended."""
        return [line for text in self.said() for line in text.splitlines() if line.startswith("dlr-lock:")]


def _run(variables: dict[str, str], log: Path, work: Callable[..., None], arguments: Sequence[Any]) -> None:
    os.environ.update(variables)
    with log.open("w", encoding="utf-8") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1)
    import torch

    torch.set_num_threads(1)
    work(*arguments)


def command(*words: str) -> None:
    """The command line, in this process."""
    from rich.console import Console

    from dlr_lock import cli

    sys.argv = ["dlr-lock", *words]
    cli._screen = Console(
        stderr=True, highlight=False
    )  # the server's is of a stream that this process has not
    cli.main()
