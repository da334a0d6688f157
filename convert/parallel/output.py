"""The output of a conversion, which one process writes and all must see."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ...common.errors import DLRError
from ...common.files import check_target, full_disk_is_an_error, whole_directory
from ...common.resume import ResumeStore, interrupted_words, run_lock
from .ranks import LOST, Ranks


@contextmanager
def shared_output(ranks: Ranks, target: Path, *, overwrite: bool) -> Iterator[tuple[Path, list[ResumeStore]]]:
    """The directory that becomes `target` when the block ends in all processes; the first one has it to itself.

    Yields:
        The directory, and a list: the parts kept in the stores that are put into it are given up once the target is
        whole.

    Raises:
        DLRError: As `whole_directory` and `run_lock` do, and where a process cannot write there.
    """
    stores: list[ResumeStore] = []
    with ExitStack() as lock:
        if not ranks.first:
            lock.enter_context(interrupted_words(target))
            lock.enter_context(full_disk_is_an_error(target))
        with ExitStack() as directory:

            def opened() -> Path:
                check_target(target, overwrite=overwrite)
                lock.enter_context(run_lock(target))
                # It checks the target again, now that nobody else writes.
                return directory.enter_context(whole_directory(target, overwrite=overwrite))

            work = ranks.agreed(opened)
            if blind := [name for name in ranks.gathered(_blind(work)) if name]:
                raise DLRError(
                    f"{blind[0]} cannot write to {target.parent} as the first process does: the output must be on a "
                    "file system that all processes share"
                )
            try:
                yield work, stores
            except Exception as error:
                if isinstance(error, DLRError) or work.is_dir():
                    raise
                raise DLRError(LOST) from error  # the first process, which has removed it
        if ranks.first:
            for store in stores:
                store.remove()
    ranks.barrier()


def _blind(work: Path) -> str:
    """The machine's name, where the directory is not there or cannot be written; "" where all is well."""
    with suppress(OSError):
        os.listdir(work.parent)  # a network's file system asks for what is new
    return "" if os.access(work, os.W_OK | os.X_OK) else socket.gethostname()
