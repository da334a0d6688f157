"""Whole models as they are used, locked against original, for the record: `bench model`'s figures in a file.

    python -m benchmarks.speed CHECKPOINT --original SRC [--engine vllm] [--dtype bfloat16] [--into FILE]

writes speed-DATE.json. One file can hold several engines and dtypes: with --into, rows of another engine or dtype that
are in it stay there.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console

from dlr_lock import DLRError
from dlr_lock.common.options import flag
from dlr_lock.compare.bench import bench_model
from dlr_lock.compare.config import SpeedConfig
from dlr_lock.compare.sections import speed_sections
from dlr_lock.progress import Steps
from dlr_lock.reporting import print_sections

from .output import target, write_json
from .schema import load

_SAME = ("device", "cpu_threads", "program")  # of runs that can be one file


def main(arguments: list[str] | None = None) -> int:
    """Times what the command line asks for; exit status 2, and one line, on what cannot be."""
    options = vars(_parser().parse_args(arguments))
    checkpoint, original, out, into = (options.pop(n) for n in ("checkpoint", "original", "out", "into"))
    try:
        earlier = load(into) if into is not None and into.exists() else None
        with Steps(Console(stderr=True, highlight=False)) as steps:
            document = bench_model(checkpoint, original, progress=steps, **options)
        print_sections(Console(highlight=False), speed_sections(document))
        path = into or target(document, "speed", out)
        if earlier is not None:
            document = merged(earlier, document)
        write_json(path, document)
    except (DLRError, OSError) as error:
        print(f"benchmarks.speed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.speed: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"written to {path}")
    return 0


def merged(earlier: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """The later document with the earlier one's rows and runs of other engines and dtypes before its own.

    Raises DLRError where the two were not measured alike.
    """
    for name in _SAME:
        if earlier[name] != document[name]:
            raise DLRError(f"{name} was {earlier[name]}, and is {document[name]}: write to another file")

    def kept(name: str) -> list[dict[str, Any]]:
        now = {(row["engine"], row["dtype"]) for row in document[name]}
        return [row for row in earlier[name] if (row["engine"], row["dtype"]) not in now] + document[name]

    versions = earlier["versions"] | document["versions"]
    return document | {"versions": versions, "rows": kept("rows"), "runs": kept("runs")}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed")
    parser.add_argument("checkpoint", help="the locked model")
    parser.add_argument("--original", required=True, help="the model that was locked")
    hints = get_type_hints(SpeedConfig)
    for field in fields(SpeedConfig):
        kind: dict[str, Any] = {"type": int} if hints[field.name] == int | None else {}
        kind = {"action": "store_true"} if hints[field.name] is bool else {"default": field.default, **kind}
        parser.add_argument(flag(field.name), help=field.metadata["help"], **kind)
    parser.add_argument("--out", type=Path, help="folder of the file, instead of the device's under results")
    parser.add_argument("--into", type=Path, help="the file, also one that is there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
