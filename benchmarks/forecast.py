"""A conversion's plan against the conversion: memory and time.

    OMP_NUM_THREADS=1 python -m benchmarks.forecast MODEL --data text.txt --layers last-1 --tokens 4096

The plan and the conversion run in processes of their own. Seconds are of the processor, so that what else the machine
does counts for neither; memory is the peak that the system saw, mapped files included. Writes JSON.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dlr_lock import DLRError
from dlr_lock.common.machine import machine

from .output import target, write_json

_PLAN = """
import json, sys, time
from dlr_lock.planning import plan, rates
rates.now = lambda device: time.process_time()
source, options = sys.argv[1:]
print(json.dumps(plan.plan_conversion(source, device="cpu", **json.loads(options)).to_dict()))
"""
_CONVERT = """
import json, re, sys, time
from pathlib import Path
from dlr_lock import convert_model
source, out, options = sys.argv[1:]
began, status = time.process_time(), Path("/proc/self/status")
convert_model(source, out, device="cpu", **json.loads(options))
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
print(json.dumps({"seconds": time.process_time() - began, "host_bytes": peak}))
"""


def main(arguments: list[str] | None = None) -> int:
    """Plans and converts; exit status 2, and one line, on bad input."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.forecast", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layers", default="last-1")
    parser.add_argument("--out", type=Path, default=None, help="Folder of the JSON.")
    defaults = {"tokens": 4096, "heldout": 1024, "train_tokens": 20_480, "batch": 512, "max_memory": "6GiB"}
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--redistill", type=float, default=0.0)
    options = parser.parse_args(arguments)
    choices = {n: getattr(options, n) for n in (*defaults, "layers", "redistill")} | {"end_to_end": 0}
    given = json.dumps(choices | {"data": str(options.data)})
    try:
        planned = _run(_PLAN, options.model, given)
        with TemporaryDirectory() as folder:
            fact = _run(_CONVERT, options.model, str(Path(folder) / "out"), given)
    except DLRError as error:
        print(f"benchmarks.forecast: {error}", file=sys.stderr)
        return 2
    errors = {name: planned[name] / fact[name] - 1 for name in ("seconds", "host_bytes")}
    document = machine(torch.device("cpu")) | {
        "model": Path(options.model).name, "params": planned["params"], "options": choices, "fact": fact,
        "plan": {n: planned[n] for n in ("seconds", "host_bytes", "flops", "phases")}, "errors": errors,
    }  # fmt: skip
    path = target(document, "forecast", options.out)
    write_json(path, document)
    for name, error in errors.items():
        print(f"{name}: planned {planned[name]:.4g}, found {fact[name]:.4g} ({error:+.0%})")
    return 0


def _run(code: str, *arguments: str) -> dict[str, Any]:
    """The last line that some code prints, in a process of its own. Raises DLRError with its last words."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise DLRError((done.stderr.strip().splitlines() or ["it was ended"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
