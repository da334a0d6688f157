"""Runs the stages one after another, each in a process of its own, within the time that there is.

    python -m benchmarks.gpu [--stage all] [--minutes 25] [--out FOLDER] [--model PATH] [--data TEXT] [--smoke]

A kernel that hangs or breaks the device costs its own case: a stage writes its JSON before and after each, one that
dies or falls silent is started anew, and goes on behind the case that did it. Run again, the command leaves finished
stages alone (unless --again) and goes on where one was cut off.
Exit status: 0, 1 where a test failed, a gate is red or a stage broke, 2 on bad input.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile

from .plan import AGAIN, GRACE, LEAST, SILENCE, SMOKE_MINUTES, SMOKE_OUT, STAGES, chosen, parser

_RESULTS = Path(__file__).resolve().parents[1] / "results"
_TRIAL = 2**20  # bytes: the files of a run take less


def main(arguments: list[str] | None = None) -> int:
    """Runs the stages that the command line asks for."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser("python -m benchmarks.gpu").parse_args(given)
    minutes = options.minutes if options.minutes is not None else (SMOKE_MINUTES if options.smoke else 25.0)
    try:
        names = chosen(options.stage)
        if not 0 < minutes < 24 * 60:
            raise ValueError(f"--minutes must be above 0 and below a day, not {minutes:g}")
        _check(options)
    except (ValueError, OSError) as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    ends = time.monotonic() + 60 * minutes
    # A tiny run spends most of its time importing torch: once is enough there.
    groups = [names] if options.smoke else [[name] for name in names]
    status = 0
    for group in groups:
        left = ends - time.monotonic()
        if left < (0 if options.smoke else LEAST):
            print(f"{group[0]}: not begun, {max(0.0, left):.0f} s are left", flush=True)
            continue
        # A stage that is named alone has all the time.
        limit = left if len(names) == 1 else min(left, sum(60 * STAGES[name] for name in group))
        ended = _stage(group, time.monotonic() + limit, options)
        if ended in (2, 130):
            return ended
        status = max(status, min(abs(ended), 1))
    return status


def _stage(names: list[str], ends: float, options: argparse.Namespace) -> int:
    """Runs stages in a process, and in another as long as one breaks, got further and there is time."""
    begun = -1
    while True:
        limit = ends - time.monotonic()
        ended = run(stage_command(names, ends, options), limit, partial(newest, options))
        if ended in (0, 1, 2, 130):
            return ended
        words = (
            "had hung" if ended is None else "lost the device" if ended == AGAIN else f"ended with {ended}"
        )
        print(
            f"{', '.join(names)}: the process {words} after {limit - ends + time.monotonic():.0f} s",
            flush=True,
        )
        before, begun = begun, cases(names, options)
        if begun <= before or ends - time.monotonic() < LEAST:
            return 1
        options = argparse.Namespace(**vars(options) | {"again": False})


def stage_command(names: list[str], ends: float, options: argparse.Namespace) -> list[str]:
    """What runs stages in a process that is to end at `ends`, of time.monotonic()."""
    grace = 0 if options.smoke else min(GRACE, (ends - time.monotonic()) / 2)
    command = [sys.executable, "-m", "benchmarks.gpu.stage", "--stage", ",".join(names)]
    command += ["--deadline", f"{ends - grace:.1f}"]
    for name in ("out", "model", "data"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name}", str(value)]
    return command + [f"--{name}" for name in ("again", "smoke") if getattr(options, name)]


def run(command: list[str], seconds: float, sign: Callable[[], object] = lambda: None) -> int | None:
    """The command's exit status; it is killed, with all that it had started, when its time is up (1) or when `sign`
    gives the same for SILENCE seconds (None)."""
    process = subprocess.Popen(command, start_new_session=True)
    began = heard = time.monotonic()
    last = sign()
    hangs = False
    try:
        while True:
            left = seconds - (time.monotonic() - began)
            with suppress(subprocess.TimeoutExpired):
                return process.wait(max(0.0, min(1.0, left)))
            if left <= 0:
                print(f"benchmarks.gpu: stopped by force after {seconds:.0f} s", flush=True)
                return 1
            if (now := sign()) != last:
                last, heard = now, time.monotonic()
            hangs = time.monotonic() - heard > SILENCE
            if hangs:
                return None
    except KeyboardInterrupt:
        print("benchmarks.gpu: interrupted; the rows that were finished are written", file=sys.stderr)
        return 130
    finally:
        _end(process, ask=not hangs)


def _end(process: subprocess.Popen, *, ask: bool) -> None:
    """Ends the process and all it started. ask: gives it time to write that it was stopped and does not hang."""
    with suppress(OSError, subprocess.TimeoutExpired):
        if ask and process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(5)
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def newest(options: argparse.Namespace, kind: str = "*") -> tuple[int, Path] | None:
    """When the newest file of the run was written, and the file."""
    where = options.out or (SMOKE_OUT if options.smoke else None)
    files = where.glob(f"{kind}-*.json") if where else _RESULTS.glob(f"*/{kind}-*.json")
    found = []
    for path in files:
        with suppress(OSError):
            found.append((path.stat().st_mtime_ns, path))
    return max(found, default=None)


def cases(names: list[str], options: argparse.Namespace) -> int:
    """How many cases the newest files of stages show as begun, finished or not."""
    total = 0
    for name in names:
        if (found := newest(options, name)) is not None:
            with suppress(OSError, ValueError):
                document = json.loads(found[1].read_text(encoding="utf-8"))
                total += len(document["rows"]) + bool(document.get("begun"))
    return total


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError or OSError where a path is not what it should be or results cannot be written."""
    if (
        options.model is not None
        and options.model.suffix != ".gguf"
        and not (options.model / "config.json").is_file()
    ):
        raise ValueError(f"--model {options.model} is no folder with a config.json and no .gguf file")
    for path in (options.model, options.data):
        if path is not None and not path.exists():
            raise ValueError(f"{path} does not exist")
    out = options.out or (SMOKE_OUT if options.smoke else _RESULTS)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=out) as trial:
            trial.write(bytes(_TRIAL))
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}") from error


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # then what was started is ended, too
    sys.exit(main())
