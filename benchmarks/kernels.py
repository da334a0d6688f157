"""The whole table: dense MLPs, plain chains and fast ones over shapes, chains and token counts.

    python -m benchmarks.kernels [--shapes 576x1536,4096x14336] [--chains 1,8x64] [--tokens 1,512]

writes JSON, the same rows as CSV and, where matplotlib is installed, a plot a shape, after every case anew. Files
appear whole: an interrupted run leaves those of the case before.
"""

import argparse
import csv
import io
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from dlr_lock import DLRError
from dlr_lock.microbench.bench import ROUNDS, cases_of, numbers, run
from dlr_lock.microbench.sections import benchmark_sections
from dlr_lock.progress import Steps
from dlr_lock.reporting import print_sections
from dlr_lock.runtime.device import usable_device

from .output import target, write_json, write_whole

SHAPES = "576x1536,2048x8192,4096x14336"  # hidden x intermediate
CHAINS = (
    "1,1x32,1x64,1x128,4x64,8x64,64x12"  # lanes; depth where it is not the default; rank where not at parity
)
TOKENS = "1,4,16,64,512,4096"
SMOKE = {"shapes": "64x96", "chains": "1x9,2x4", "tokens": "1,3"}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark that the command line asks for; exit status 2, and one line, on bad input."""
    options = _parser().parse_args(arguments)
    if options.smoke:
        vars(options).update(SMOKE)
    try:
        device = usable_device(options.device)
        tokens = numbers(options.tokens)
        cases = [
            case
            for shape in options.shapes.split(",")
            for chain in options.chains.split(",")
            for case in cases_of(shape, chain, tokens)
        ]
        screen = Console(stderr=True, highlight=False)
        with Steps(screen) as steps:
            document = run(
                cases,
                device=device,
                dtype=options.dtype,
                providers=options.providers.split(",") if options.providers else None,
                rounds=2 if options.smoke else ROUNDS,
                cold_bytes=0 if options.smoke else None,
                minutes=options.minutes,
                save=lambda document: save(document, options.out),
                progress=steps,
            )
        plots = plot(document, options.out)
    except (DLRError, OSError) as error:
        print(f"benchmarks.kernels: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.kernels: interrupted; what was measured is written", file=sys.stderr)
        return 130
    print_sections(Console(highlight=False), benchmark_sections(document))
    for path in (*_targets(document, options.out), *plots):
        print(f"written to {path}")
    return 0


def save(document: dict[str, Any], out: Path | None) -> None:
    """Writes the results as JSON and CSV, each file whole."""
    json_file, csv_file = _targets(document, out)
    text = io.StringIO()
    if document["rows"]:
        writer = csv.DictWriter(text, list(document["rows"][0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(document["rows"])
    write_json(json_file, document)
    write_whole(csv_file, lambda path: path.write_text(text.getvalue()))


def plot(document: dict[str, Any], out: Path | None) -> list[Path]:
    """A plot a shape, time against tokens, a panel a chain; none without matplotlib. Returns what was written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    rows = [row for row in document["rows"] if row["median_us"]]
    written = []
    for hidden, intermediate in dict.fromkeys((row["hidden"], row["intermediate"]) for row in rows):
        shape = [r for r in rows if (r["hidden"], r["intermediate"]) == (hidden, intermediate)]
        chains = list(dict.fromkeys((r["lanes"], r["depth"], r["rank"]) for r in shape))
        columns = min(3, len(chains))
        height = math.ceil(len(chains) / columns)
        figure = Figure(figsize=(5 * columns, 4 * height), layout="constrained")
        panels = figure.subplots(height, columns, sharey=True, squeeze=False).flat
        for panel, chain in zip(panels, chains, strict=False):
            own = [r for r in shape if (r["lanes"], r["depth"], r["rank"]) == chain]
            for provider in dict.fromkeys(r["provider"] for r in own):
                line = sorted((r["tokens"], r["median_us"]) for r in own if r["provider"] == provider)
                panel.loglog(*zip(*line, strict=True), marker="o", markersize=3, label=provider)
            panel.set(title="x".join(map(str, chain)), xlabel="tokens", ylabel="us")
            panel.legend(fontsize="x-small")
        figure.suptitle(f"MLP {hidden} x {intermediate}, {document['device']}")
        path = _targets(document, out)[0].with_suffix(f".{hidden}x{intermediate}.png")
        write_whole(path, partial(figure.savefig, format="png", dpi=120))
        written.append(path)
    return written


def _targets(document: dict[str, Any], out: Path | None) -> tuple[Path, Path]:
    """The JSON and the CSV file."""
    path = target(document, "kernels", out)
    return path, path.with_suffix(".csv")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the files, instead of one a device under results")
    parser.add_argument("--shapes", default=SHAPES, help="MLPs, hidden x intermediate")
    parser.add_argument(
        "--chains", default=CHAINS, help="lanes, x depth, x rank; what is left out follows from parity"
    )
    parser.add_argument("--tokens", default=TOKENS, help="token counts")
    parser.add_argument("--providers", help="such as dense-graph,ours-graph; by default all of the device")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; the best there is by default")
    parser.add_argument("--minutes", type=float, help="begin no case after this time")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, to see that it runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
