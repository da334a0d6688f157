"""The process of a stage: what it measures is written after every row, and continued where it was cut off."""

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from dlr_lock import DLRError
from dlr_lock.runtime.checkpoint import usable_device
from dlr_lock.runtime.timing import device_name, machine

from ..output import files, folder, source, target, write_json
from ..schema import SCHEMA, faults, load
from .plan import SMOKE_OUT, chosen, parser

T = TypeVar("T")
_CUT_OFF = "cut off"  # what stands in the file until the stage ends by itself
_SAME = ("device", "driver", "program", "versions", "source", "smoke", "options")  # of runs that can be one


class Record:
    """A stage's document, its options and the time that it has left."""

    def __init__(self, stage: str, options: argparse.Namespace, device: torch.device, seconds: float) -> None:
        self.stage, self.options, self.device = stage, options, device
        self.smoke: bool = options.smoke
        self.out: Path | None = SMOKE_OUT if options.smoke and options.out is None else options.out
        self._began = time.monotonic()
        self._ends = self._began + seconds
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
            "rows": [],
        }
        self._before = 0.0
        self._path = target(self.document, stage, self.out)

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

    def unmeasured(self, items: Sequence[T], key: Callable[[T], dict[str, Any]]) -> Iterator[T]:
        """The items that no row has the key's values of, as long as there is time; then `stopped` says so."""
        for done, item in enumerate(items):
            if self.has(**key(item)):
                continue
            if self.left() <= 0:
                self.stop(f"after {done} of {len(items)}: the limit of time")
                return
            print(f"{self.stage}: {' '.join(str(v) for v in key(item).values())}", flush=True)
            yield item

    def stop(self, why: str | None) -> None:
        """Says why the stage does not measure all that it should; None: it does."""
        self.document["stopped"] = why

    def add(self, *rows: Any) -> None:
        """Keeps rows, dataclasses, and writes the file."""
        self.document["rows"] += [asdict(row) for row in rows]
        self.save()

    def save(self) -> Path:
        """Writes the file, checked; raises RuntimeError on a document that could not be read again."""
        self.document["seconds"] = round(self._before + time.monotonic() - self._began, 1)
        for fault in faults(self.document, self.stage):
            raise RuntimeError(f"{self.stage}: {fault}")
        write_json(self._path, self.document)
        return self._path


def main(arguments: list[str] | None = None) -> int:
    """Runs the stages named, each for `--minutes`; the largest of their exit statuses."""
    options = parser("python -m benchmarks.gpu.stage").parse_args(arguments)
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
    return max(run(name, options, device) for name in chosen(options.stage))


def run(name: str, options: argparse.Namespace, device: torch.device) -> int:
    """One stage, its file written and its end told; 1 where it broke or found something wrong."""
    record = Record(name, options, device, 60 * options.minutes)
    if not options.again and record.resume():
        print(f"{name}: measured already, {record.save().name}; --again measures it once more", flush=True)
        return 1 if wrong(record.document) else 0
    broke = False
    try:
        importlib.import_module(f".{name}", __package__).measure(record)
    except DLRError as error:
        record.stop(str(error))
        broke = True
    except Exception as error:
        traceback.print_exc()  # nobody may come back to this machine: say all there is to say
        record.stop(f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}")
        broke = True
    record.document["finished"] = record.document["stopped"] == _CUT_OFF
    if record.document["finished"]:
        record.stop(None)
    path, bad = record.save(), wrong(record.document)
    print(
        f"{name}: {record.document['stopped'] or 'finished'}, {len(record.rows)} rows in {path}", flush=True
    )
    for line in bad:
        print(f"{name}: {line}", flush=True)
    return 1 if broke or bad else 0


def wrong(document: dict[str, Any]) -> list[str]:
    """What a reader must see first: tests that failed, gates that are red."""
    lines = []
    for row in document["rows"]:
        if row.get("failed"):
            lines += [f"FAILED {failure}" for failure in row["failures"]]
        if row.get("accurate") is False:
            what = " ".join(
                str(v) for v in row.values() if isinstance(v, str | int) and not isinstance(v, bool)
            )
            why = row.get("error_message") or f"error {row.get('error')}, limit {row.get('error_limit')}"
            lines.append(f"RED {what}: {why}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
