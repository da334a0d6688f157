"""Figures of long work as it goes on, for TensorBoard."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DLRError
from .files import writable_folder

Scalars = Callable[
    [str, float, int], None
]  # (tag, value, step); what comes before a tag's first "/" is its group


def no_scalars(tag: str, value: float, step: int) -> None:
    """Scalars that go nowhere."""


@contextmanager
def scalar_log(folder: str | Path | None) -> Iterator[Scalars]:
    """What writes scalars into a folder, each seen by a TensorBoard that watches it at most ten seconds later.

    Args:
        folder: Made where it is not there; more is added to what it holds. None for no log.

    Raises:
        DLRError: Where the package tensorboard is missing, and where the folder cannot be written to.
    """
    if folder is None:
        yield no_scalars
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise DLRError("--log-dir needs the package tensorboard: pip install 'dlr-lock[log]'") from error
    path = Path(folder).expanduser().absolute()
    writable_folder(path)
    try:
        writer = SummaryWriter(str(path), flush_secs=10)
    except OSError as error:
        raise DLRError(f"cannot write to {path}: {error.strerror}") from error
    try:
        yield writer.add_scalar
    finally:
        writer.close()
