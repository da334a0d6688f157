"""What several processes cost on a machine's cores: one with all of them against N that share them, in turns.

    python -m benchmarks.processes SOURCE --data text.txt --processes 2 -- --layers 12-13 --effort quick

SOURCE is converted by one process on all cores and by N on as many, each way `--rounds` times; what follows `--` is
`dlr-lock convert`'s. The machine must have nothing else to do. Prints what N processes took over what one
took, and how far the modules' relative errors are apart; writes JSON. Exit status 2 on bad input.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from dlr_lock import DLRError
from dlr_lock.common.machine import machine

from .output import target, write_json

WAYS = ("sequential", "independent")


def main(arguments: list[str] | None = None) -> int:
    """Converts in turns and says what it took."""
    given = sys.argv[1:] if arguments is None else arguments
    at = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        prog="benchmarks.processes", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("source", help="A model, as `convert` takes it.")
    parser.add_argument("--data", required=True, help="Calibration text.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--across", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--out", type=Path, default=None, help="Folder of the JSON.")
    options = parser.parse_args(given[:at])
    cores = len(os.sched_getaffinity(0))
    if not 2 <= options.processes <= cores:
        print(f"benchmarks.processes: --processes must be from 2 to {cores}, the cores here", file=sys.stderr)
        return 2
    document: dict[str, Any] = machine(torch.device("cpu")) | {"processes": options.processes, "ways": {}}
    try:
        for across in options.across:
            flags = ["--data", options.data, "--across", across, "--device", "cpu", *given[at + 1 :]]
            found: dict[int, list[dict[str, Any]]] = {1: [], options.processes: []}
            for _ in range(options.rounds):
                for count, reports in found.items():
                    reports.append(converted(options.source, count, cores // count, flags))
            document["ways"][across] = row = compared(*found.values())
            print(
                f"{across}: {options.processes} processes took {row['ratio']:.3f} of one's time; the modules' errors "
                f"differ by {row['error_difference']:.1e} at most"
            )
    except DLRError as error:
        print(f"benchmarks.processes: {error}", file=sys.stderr)
        return 2
    path = target(document, "processes", options.out)
    write_json(path, document)
    print(f"written to {path}")
    return 0


def converted(source: str, count: int, threads: int, flags: list[str]) -> dict[str, Any]:
    """One conversion's report. Raises DLRError with what it says where it fails."""
    start = [sys.executable, "-m"]
    if count > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    folder = Path(tempfile.mkdtemp())
    try:
        done = subprocess.run(
            [*start, "dlr_lock", "convert", source, str(folder / "out"), "--json", *flags],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
        )
    finally:
        shutil.rmtree(folder)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("dlr-lock: ")]
        raise DLRError(lines[0].removeprefix("dlr-lock: ") if lines else done.stderr[-300:])
    return json.loads(done.stdout)


def compared(ones: list[dict[str, Any]], severals: list[dict[str, Any]]) -> dict[str, Any]:
    """The seconds of all rounds, their medians' ratio, and the errors' largest difference."""
    took = [[report["seconds"] for report in reports] for reports in (ones, severals)]
    errors = [[m["rel_error"] for m in reports[0]["modules"]] for reports in (ones, severals)]
    return {
        "seconds": took[0],
        "seconds_several": took[1],
        "ratio": statistics.median(took[1]) / statistics.median(took[0]),
        "error_difference": max(abs(b / a - 1) for a, b in zip(*errors, strict=True)),
    }


if __name__ == "__main__":
    sys.exit(main())
