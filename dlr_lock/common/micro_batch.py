"""What goes through a device at once shrinks where its memory runs out; the batches that it is part of stay."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from .errors import DLRError

T = TypeVar("T")


class MicroBatch:
    """How much of one kind of work a device takes at once: half as much from then on where its memory runs out.

    One object serves all of that work in a run, so that what did not fit once is not tried again.

    Args:
        what: The work, as in "the end-to-end phase".
        unit: What is counted, in the singular: token or sequence.
    """

    def __init__(self, what: str, unit: str) -> None:
        self._what, self._unit = what, unit
        self._asked = 0  # that did not fit, the largest
        self._most: int | None = None  # that is tried since

    def fit(self, work: Callable[[int], T], size: int) -> T:
        """What `work` gives for at most so many at once. It is begun anew wherever the memory runs out.

        Args:
            work: Called with how many at once.
            size: How many at first.

        Raises:
            DLRError: Where not even one fits.
        """
        while True:
            at_once = size if self._most is None else min(size, self._most)
            try:
                return work(at_once)
            except torch.OutOfMemoryError:
                pass  # only behind the handler is what did not fit let go: the error holds the frames that it passed
            gc.collect()
            if at_once <= 1:
                raise DLRError(
                    f"the device's memory does not hold {self._what}, even one {self._unit} at a time: free it of "
                    "other work, or take a device with more, or --device cpu"
                )
            self._asked = max(self._asked, at_once)
            self._most = at_once // 2

    def each(self, work: Callable[[slice], object], count: int, size: int) -> None:
        """Calls `work` with slices that make up 0 to `count`, in order, each as large as fits and at most `size`.

        Where the memory runs out it is called again from the same place on: it must leave nothing behind by then.
        Errors are as for `fit`.
        """
        at = 0

        def one(at_once: int) -> int:
            rows = slice(at, min(at + at_once, count))
            work(rows)
            return rows.stop

        while at < count:
            at = self.fit(one, size)

    @property
    def note(self) -> str | None:
        """What became of it, in a sentence; None where all fitted."""
        if self._most is None:
            return None
        many = "" if self._most == 1 else "s"
        return (
            f"the device's memory did not hold {self._what} with {self._asked} {self._unit}s at once: it went on with "
            f"{self._most} {self._unit}{many}, in batches as large as before"
        )
