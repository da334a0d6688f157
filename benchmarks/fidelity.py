"""How well chains do what their MLPs did, and what redistilling them costs.

    python -m benchmarks.fidelity modules MODEL --data text.txt --layers 1,12,25 --train-tokens 102400,409600
    python -m benchmarks.fidelity products MODEL --data text.txt --layers 1,12
    python -m benchmarks.fidelity model MODEL --data text.txt --train-tokens 102400,409600 --end-to-end 131072
    python -m benchmarks.fidelity sentences ENCODER --data text.txt --sentences sentences.txt

`modules` fits chains to single MLPs: error, gap and the attack's cost against training tokens, FLOPs and seconds.
`products` fits them with products in float32 and in bfloat16, whatever the device is fast at: both errors' ratio.
`model` locks layers and measures the whole: loss, KL and flips against FLOPs and seconds, after the fits, on the way
through an end-to-end phase and at its end; and the same of the model whose chains have all been distilled back, one at
a time, from the linear start.
`sentences` locks a sentence encoder and compares embeddings.
FLOPs are reckoned as `dlr-lock plan` does. Writes JSON and, where matplotlib is installed, a plot. A study of whole
models that was interrupted, or killed, is gone on with by the same command, from its finished modules.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rich.console import Console

from dlr_lock import DLRError
from dlr_lock.common.files import read_json
from dlr_lock.common.machine import machine
from dlr_lock.common.options import flag, help_of
from dlr_lock.convert.config import ConversionConfig
from dlr_lock.convert.mlp_discovery import automatic
from dlr_lock.microbench.bench import numbers
from dlr_lock.progress import Steps
from dlr_lock.reporting import Section, Table, print_sections
from dlr_lock.runtime.device import usable_device

from .fidelity_model import Job, model, sentences
from .fidelity_modules import OF_RECIPE, modules, products
from .output import files, target, write_json, write_whole
from .schema import SCHEMA

_OF_CONVERSION = (
    "layers", "depth", "rank", "lanes", "act", "params", "init", "tokens", "batch", "seed", "sequence", "end_to_end",
    "device",
)  # fmt: skip
Panels = dict[tuple[str, str], dict[str, list[tuple[float, float]]]]  # axes to lines, by label
_OF_MODULES = ("modules", "products")  # the studies of single modules
_DISTANCES = {"kl": "KL on held-out text", "state_error": "error of the last hidden states on held-out text"}
_SAME = ("device", "cpu_threads", "program", "versions", "study", "options")  # of runs that can be one


def main(arguments: list[str] | None = None) -> int:
    """Runs the study that the command line asks for; exit status 2, and one line, on bad input."""
    options = _parser().parse_args(arguments)
    try:
        document = {"schema": SCHEMA, **machine(usable_device(options.device)), "study": options.study}
        document |= {"stopped": "before its end", "rows": []}
        document["options"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        for private in ("out", "model", "data", "sentences"):  # paths of this machine
            given = document["options"].pop(private, None)
            if given and private != "out":
                document["options"][private] = Path(given).name
        kind = f"fidelity-{options.study}"
        path = target(document, kind, options.out)
        if options.study not in _OF_MODULES:
            path = _taken_over(document, path, kind)
        run = hashlib.sha256(json.dumps([document[name] for name in _SAME]).encode()).hexdigest()[:8]
        with Steps(Console(stderr=True, highlight=False)) as steps:
            job = Job(
                options, _options(options), _shares(getattr(options, "redistill", "")),
                path.with_name(f"{kind}-{run}"), list(document["rows"]), steps,
            )  # fmt: skip
            for row in _STUDIES[options.study](job):
                document["rows"].append(row)
                write_json(path, document)  # after every row: an interruption costs the one at work
        write_json(path, document | {"stopped": None, "finished": True})
    except (DLRError, OSError, UnicodeError) as error:
        print(f"benchmarks.fidelity: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(
            f"benchmarks.fidelity: {str(stop) or 'interrupted'}; finished rows are written", file=sys.stderr
        )
        return 130
    _show(document["rows"])
    print(f"written to {path}")
    if drawn := _plot(document, path.with_suffix(".png")):
        print(f"written to {drawn}")
    return 0


def _taken_over(document: dict[str, Any], path: Path, kind: str) -> Path:
    """The file of an interrupted run of the same, whose rows are put into the document; `path` where there is none."""
    for earlier in files(path.parent, kind):
        found = read_json(earlier)
        if found.get("finished") is False and all(found.get(n) == document[n] for n in _SAME):
            document |= found
            return earlier
    document["finished"] = False
    return path


_STUDIES: dict[str, Callable[[Job], Iterator[dict[str, Any]]]] = {
    "modules": modules,
    "products": products,
    "model": model,
    "sentences": sentences,
}


def _options(options: argparse.Namespace) -> ConversionConfig:
    given = {name: value for name in _OF_CONVERSION if (value := getattr(options, name, None)) is not None}
    given |= {"data": str(options.data), "train_tokens": numbers(options.train_tokens)[0], "redistill": 0.0}
    if automatic(given.get("layers")):
        raise DLRError(f"--layers {given['layers']}: name layers, `dlr-lock layers` says which")
    return ConversionConfig(**given).resolved()


def _show(rows: list[dict[str, Any]]) -> None:
    """The plain figures of every row, as a table."""
    plain = [
        {k: v for k, v in row.items() if isinstance(v, int | float | str) and k != "seed"} for row in rows
    ]
    names = list(dict.fromkeys(name for row in plain for name in row))
    cells = [[row.get(name, "-") for name in names] for row in plain]
    rows = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in cells]
    print_sections(Console(highlight=False), [Section("", table=Table(names, rows))])


def _plot(document: dict[str, Any], path: Path) -> Path | None:
    """The document's curves, on logarithmic axes; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    panels = (_of_modules if document["study"] in _OF_MODULES else _of_models)(document["rows"])
    figure = Figure(figsize=(7 * len(panels), 5), layout="constrained")
    figure.suptitle(document["device"])
    for number, ((x, y), lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for label, points in lines.items():
            axes.loglog(*zip(*points, strict=True), marker=".", label=label)
        axes.set(xlabel=x, ylabel=y)
        axes.legend(fontsize="small")
    write_whole(path, partial(figure.savefig, format="png", dpi=120))
    return path


def _of_modules(rows: list[dict[str, Any]]) -> Panels:
    """Error against training tokens, a line a fit."""
    lines = {}
    for row in rows:
        label = f"layer {row['layer']}, {row['train_tokens']:,} training tokens, gap {row['flatten_gap']:.2f}"
        label += f", products in {row['products']}" if "products" in row else ""
        lines[label] = [(point["train_tokens"], point["rel_error"]) for point in row["curve"]]
    return {("training tokens", "relative error on held-out tokens"): lines}


def _of_models(rows: list[dict[str, Any]]) -> Panels:
    """KL, or the error of hidden states, against minutes and FLOPs; a line a conversion, from its fits through the
    looks at the end-to-end phase to its end."""
    panels: Panels = {}
    for row in rows:
        label = f"{row['across']}, {row['train_tokens']:,} training tokens a module"
        for point in (*row.get("looks", ()), row):
            y = next(name for name in ("kl", "state_error") if name in point)
            for x, value in {"minutes": point["seconds"] / 60, "FLOPs": point["flops"]}.items():
                line = panels.setdefault((x, _DISTANCES[y]), {}).setdefault(label, [])
                line.append((value, point[y]))
    return panels


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",") if part]
    except ValueError as error:
        raise DLRError(f"{text!r} is not a list of shares such as 0.25,1") from error
    if not all(0 < share <= 100 for share in shares):
        raise DLRError(
            f"the attack's shares of the training tokens must be above 0 and at most 100, not {text}"
        )
    return shares


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity")
    studies = parser.add_subparsers(dest="study", required=True)
    for name, about in (
        ("modules", "fit chains to single MLPs"),
        ("products", "the same with products in float32 and in bfloat16"),
        ("model", "lock layers and measure the whole model"),
        ("sentences", "lock a sentence encoder and compare embeddings"),
    ):
        made = studies.add_parser(name, help=about)
        made.add_argument("model", help="a transformers directory, a hub id or a .gguf file")
        made.add_argument("--data", required=True, help="calibration text, as `dlr-lock convert` takes it")
        made.add_argument("--train-tokens", default="409600", help="of a module; a list for several fits")
        for option in _OF_CONVERSION:
            if option != "end_to_end":
                kinds = get_type_hints(ConversionConfig)[option]
                kind = next(kind for kind in (int, float, str) if kind in (kinds, *get_args(kinds)))
                words = help_of(ConversionConfig, option).replace("%", "%%")  # argparse fills in its own
                made.add_argument(flag(option), type=kind, help=words)
        made.add_argument(
            "--out", type=Path, help="folder of the files, instead of one a device under results"
        )
        if name != "products":
            made.add_argument(
                "--redistill", default="", help="training tokens of attacks, as shares of the fit's: 0.25,1"
            )
        if name in _OF_MODULES:
            for option in OF_RECIPE:
                made.add_argument(flag(option), type=float, help="of the recipe, see Recipe")
        else:
            both = "independent,sequential"
            made.add_argument("--across", default=both if name == "model" else "sequential")
            made.add_argument(
                "--end-to-end", type=int, default=0, help="training tokens of the end-to-end phase"
            )
        if name == "sentences":
            made.add_argument("--sentences", type=Path, required=True, help="a file, one sentence a line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
