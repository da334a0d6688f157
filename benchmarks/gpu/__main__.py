"""Runs the stages one after another, each in a process of its own, within the time that there is.

    python -m benchmarks.gpu [--stage all] [--minutes 25] [--out FOLDER] [--model PATH] [--data TEXT] [--smoke]

A kernel that hangs or breaks the device costs its own stage, not those after it. A stage writes its JSON after every
row; run again, the command leaves finished stages alone (unless --again) and goes on where one was cut off.
Exit status: 0, 1 where a test failed, a gate is red or a stage broke, 2 on bad input.
"""

import argparse
import os
import signal
import subprocess
import sys
import time

from .plan import GRACE, LEAST, SMOKE_MINUTES, STAGES, chosen, parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the stages that the command line asks for."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser("python -m benchmarks.gpu").parse_args(given)
    minutes = options.minutes if options.minutes is not None else (SMOKE_MINUTES if options.smoke else 25.0)
    try:
        names = chosen(options.stage)
        if not 0 < minutes < 24 * 60:
            raise ValueError(f"--minutes must be above 0 and below a day, not {minutes:g}")
        for path in (options.model, options.data):
            if path is not None and not path.exists():
                raise ValueError(f"{path} does not exist")
    except ValueError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    ends = time.monotonic() + 60 * minutes
    # A tiny run spends most of its time importing torch: once is enough there.
    groups = [names] if options.smoke else [[name] for name in names]
    status = 0
    for group in groups:
        left = ends - time.monotonic()
        if left < LEAST and not options.smoke:
            print(f"{group[0]}: not begun, {max(0.0, left):.0f} s are left", flush=True)
            continue
        limit = min(left, sum(60 * STAGES[name] for name in group))
        ended = run(stage_command(group, limit, options), limit)
        if ended is None:
            print(f"{', '.join(group)}: stopped by force after {limit:.0f} s", flush=True)
        elif ended in (2, 130):
            return ended
        status = max(status, 1 if ended is None else min(abs(ended), 1))
    return status


def stage_command(names: list[str], limit: float, options: argparse.Namespace) -> list[str]:
    """What runs stages in a process that has `limit` seconds."""
    soft = limit / len(names) if options.smoke else max(5.0, limit - GRACE)
    command = [sys.executable, "-m", "benchmarks.gpu.stage", "--stage", ",".join(names)]
    command += ["--minutes", f"{soft / 60:.4f}"]
    for name in ("out", "model", "data"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name}", str(value)]
    return command + [f"--{name}" for name in ("again", "smoke") if getattr(options, name)]


def run(command: list[str], seconds: float) -> int | None:
    """The command's exit status, None where it had to be killed, with all that it had started."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    except KeyboardInterrupt:
        print("benchmarks.gpu: interrupted; the rows that were finished are written", file=sys.stderr)
        return 130
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
