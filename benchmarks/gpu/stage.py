"""The process of a stage: what it measures is written after every row, and continued where it was cut off.

What is being measured stands in the file (`begun`) while it is: a case that hung or took the process with it becomes a
row that says so when the stage goes on, and is not tried again.
"""

import argparse
import ctypes
import importlib
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from dlr_lock import DLRError
from dlr_lock.common import errors
from dlr_lock.common.machine import device_name, machine
from dlr_lock.runtime.device import usable_device

from ..output import files, folder, source, target, write_json
from ..schema import SCHEMA, TIMES, faults, load
from .plan import AGAIN, MODULES, SMOKE_OUT, chosen, parser

T = TypeVar("T")
_CUT_OFF = "cut off"  # what stands in the file until the stage ends by itself
_SAME = ("device", "driver", "program", "versions", "source", "smoke", "options")  # of runs that can be one
_HEARTBEAT = 10.0  # seconds between the signs of life of a long case
_CACHE = "DLR_LOCK_CACHE"


class DeviceLost(Exception):
    """The GPU can no longer be used by this process; a fresh one goes on."""


def check_device(error: BaseException) -> None:
    """Raises DeviceLost where a case has failed such that nothing after it can be measured by this process."""
    if isinstance(error, DeviceLost):
        raise error
    lost = getattr(torch, "AcceleratorError", None)
    if lost is not None and isinstance(error, lost) and not isinstance(error, torch.OutOfMemoryError):
        raise DeviceLost(str(error).strip().partition("\n")[0]) from error


# What fails becomes the row's message; raises DeviceLost where nothing after it can be measured.
capture_error = partial(errors.capture_error, check=check_device)


class Record:
    """A stage's document, its options and the time that it has left."""

    def __init__(self, stage: str, options: argparse.Namespace, device: torch.device, ends: float) -> None:
        self.stage, self.options, self.device = stage, options, device
        self.smoke: bool = options.smoke
        self.out: Path | None = SMOKE_OUT if options.smoke and options.out is None else options.out
        self._began = time.monotonic()
        self._ends = ends
        self._saved = self._began
        self.document: dict[str, Any] = {
            "schema": SCHEMA,
            "stage": stage,
            **machine(device),
            "source": source(),
            "smoke": options.smoke,
            "finished": False,
            "stopped": _CUT_OFF,
            "seconds": 0.0,
            "options": {
                name: path.name if (path := getattr(options, name)) else None for name in ("model", "data")
            },
            "settings": {"environment": _environment()},
            "begun": None,
            "rows": [],
        }
        self._before = 0.0
        self._path = target(self.document, stage, self.out)

    @property
    def name(self) -> str:
        """Of the file, without its suffix."""
        return self._path.stem

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.document["rows"]

    def resume(self) -> bool:
        """Takes over the newest file of the same program, device and options; whether it is finished already."""
        for path in files(folder(self.document["device"], self.out), self.stage)[:1]:
            try:
                earlier = load(path)
            except DLRError:
                return False  # of another version: it stays, and a file of this one goes beside it
            if any(earlier.get(name) != self.document[name] for name in _SAME):
                return False
            if earlier["settings"].get("environment") != self.document["settings"]["environment"]:
                return False
            self._path, self.document = path, earlier
            self._before = earlier["seconds"]
            if not earlier["finished"]:
                self.document["stopped"] = _CUT_OFF
            return earlier["finished"]
        return False

    def left(self) -> float:
        """Seconds."""
        return self._ends - time.monotonic()

    def has(self, **values: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row[name] == value for name, value in values.items()) for row in self.rows)

    def unmeasured(
        self,
        items: Sequence[T],
        key: Callable[[T], dict[str, Any]],
        failed: Callable[[T, str], Any] | None = None,
    ) -> Iterator[T]:
        """The items that no row has the key's values of, as long as there is time; then `stopped` says so.

        failed: the row of an item that hung or took the process with it, and why. Without it the stage ends there.
        """
        for done, item in enumerate(items):
            if self.has(**key(item)):
                continue
            begun = self.document.get("begun") or {}
            if begun.get("key") == key(item):
                why = f"hung or crashed: {begun['why']}" if begun.get("why") else "hung or crashed"
                if failed is None:
                    raise DLRError(f"{' '.join(str(v) for v in key(item).values())} {why}")
                self.document["begun"] = None
                self.add(failed(item, why))
                continue
            if self.left() <= 0:
                self.stop(f"after {done} of {len(items)}: the limit of time")
                break
            print(f"{self.stage}: {' '.join(str(v) for v in key(item).values())}", flush=True)
            self.document["begun"] = {"key": key(item)}
            self.save()
            yield item
        self.document["begun"] = None

    def alive(self, why: str | None = None) -> None:
        """A sign of life within a long case. why: where it is, to be told if it hangs."""
        if why is not None and self.document.get("begun"):
            self.document["begun"]["why"] = why
        if time.monotonic() - self._saved > _HEARTBEAT:
            self.save()

    def stop(self, why: str | None) -> None:
        """Says why the stage does not measure all that it should; None: it does."""
        self.document["stopped"] = why

    def add(self, *rows: Any) -> None:
        """Keeps rows, dataclasses, and writes the file. What is no finite number becomes None, and the row red."""
        self.document["rows"] += [finite(asdict(row)) for row in rows]
        self.save()

    def save(self) -> Path:
        """Writes the file, checked; raises RuntimeError on a document that could not be read again."""
        self.document["seconds"] = round(self._before + time.monotonic() - self._began, 1)
        for fault in faults(self.document, self.stage):
            raise RuntimeError(f"{self.stage}: {fault}")
        write_json(self._path, self.document)
        self._saved = time.monotonic()
        return self._path


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """The row with None in the place of NaN and infinity, and then with a message and without times."""
    wrong = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if wrong:
        row = row | dict.fromkeys(wrong)
        if "error_message" in row:
            row["error_message"] = row["error_message"] or f"not finite: {', '.join(wrong)}"
        if "accurate" in row:
            row["accurate"] = False
    return row | dict.fromkeys(row.keys() & set(TIMES)) if row.get("accurate") is False else row


def main(arguments: list[str] | None = None) -> int:
    """Runs the stages named, each for its share of the time; the largest of their exit statuses, or AGAIN."""
    made = parser("python -m benchmarks.gpu.stage")
    made.add_argument("--deadline", type=float, help="instead of --minutes: time.monotonic() at their end")
    options = made.parse_args(arguments)
    ends = options.deadline
    if ends is None:
        ends = time.monotonic() + 60 * options.minutes
    try:
        device = torch.device("cpu") if options.smoke else usable_device("cuda")
    except DLRError:
        print("benchmarks.gpu: no GPU here; --smoke runs the same stages on a CPU", file=sys.stderr)
        return 2
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    elif options.smoke:
        torch.set_num_threads(1)  # at tiny sizes threads cost more than they bring
    print(f"{', '.join(chosen(options.stage))} on {device_name(device)}", flush=True)
    names = chosen(options.stage)
    statuses = [0]
    for number, name in enumerate(names):
        now = time.monotonic()
        statuses.append(run(name, options, device, now + (ends - now) / (len(names) - number)))
        if statuses[-1] == AGAIN:
            return AGAIN
    return max(statuses)


def run(name: str, options: argparse.Namespace, device: torch.device, ends: float) -> int:
    """One stage, its file written and its end told; 1 where it broke or found something wrong, AGAIN where a fresh
    process is to go on."""
    record = Record(name, options, device, ends)
    if not options.again and record.resume():
        print(f"{name}: measured already, {record.save().name}; --again measures it once more", flush=True)
        return 1 if wrong(record.document) else 0
    broke = False
    try:
        record.save()
        try:
            importlib.import_module(f".{MODULES.get(name, name)}", __package__).measure(record)
        except Exception as error:
            check_device(error)
            raise
    except (SystemExit, KeyboardInterrupt):  # from outside: what was begun is no case that hangs
        record.document["begun"] = None
        record.save()
        raise
    except DeviceLost as error:
        print(f"{name}: {error}", flush=True)
        record.stop(f"the device was lost: {error}")
        record.alive(str(error))
        record.save()
        return AGAIN
    except DLRError as error:
        record.stop(str(error))
        broke = True
    except Exception as error:
        traceback.print_exc()  # nobody may come back to this machine: say all there is to say
        record.stop(f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}")
        broke = True
    record.document["begun"] = None
    record.document["finished"] = record.document["stopped"] == _CUT_OFF
    if record.document["finished"]:
        record.stop(None)
    try:
        path = record.save()
    except (RuntimeError, OSError, ValueError) as error:
        print(f"{name}: the last rows cannot be written: {error}", flush=True)
        return 1
    bad = wrong(record.document)
    print(
        f"{name}: {record.document['stopped'] or 'finished'}, {len(record.rows)} rows in {path}", flush=True
    )
    for line in bad:
        print(f"{name}: {line}", flush=True)
    return 1 if broke or bad else 0


def _environment() -> dict[str, str]:
    """Our own variables that change what is measured."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith("DLR_LOCK_") and k != _CACHE}


def die_with_parent() -> None:
    """Kills this process when the one that started it ends; on Linux alone."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def wrong(document: dict[str, Any]) -> list[str]:
    """What a reader must see first: tests that failed, gates that are red."""
    lines = []
    for row in document["rows"]:
        if row.get("failed"):
            lines += [f"FAILED {failure}" for failure in row["failures"]]
        if row.get("accurate") is False or row.get("error_message"):
            what = " ".join(
                str(v) for v in row.values() if isinstance(v, str | int) and not isinstance(v, bool)
            )
            why = row.get("error_message") or f"error {row.get('error')}, limit {row.get('error_limit')}"
            lines.append(f"RED {what}: {why}")
    return lines


if __name__ == "__main__":
    die_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
