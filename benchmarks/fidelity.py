"""How well chains do what their MLPs did, and what redistilling them costs.

    python -m benchmarks.fidelity modules MODEL --data text.txt --layers 1,12,25 --train-tokens 102400,409600
    python -m benchmarks.fidelity model   MODEL --data text.txt --layers 12-17 --across independent,sequential
    python -m benchmarks.fidelity sentences ENCODER --data text.txt --sentences sentences.txt

`modules` fits chains to single MLPs: error, gap and the attack's cost against training tokens, FLOPs and seconds.
`model` locks layers and measures the whole: loss, KL and flips, before and after an end-to-end phase; and the same of
the model whose chains have all been distilled back, one at a time, from the linear start.
`sentences` locks a sentence encoder and compares embeddings.
Writes JSON and, where matplotlib is installed, a plot of `modules`.
"""

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from dlr_lock import DLRError, DLRNet
from dlr_lock.audit.attacks.redistillation import merge_steps
from dlr_lock.common.hooks import frozen
from dlr_lock.common.machine import machine
from dlr_lock.common.options import flag, help_of
from dlr_lock.common.resume import ResumeStore
from dlr_lock.common.splits import random_rows
from dlr_lock.convert.activations import Activations, capture
from dlr_lock.convert.config import ConversionConfig, Recipe
from dlr_lock.convert.context import Context
from dlr_lock.convert.data import calibration_text
from dlr_lock.convert.end_to_end import EndToEndPlan, flatten_gaps, train_end_to_end, with_chains
from dlr_lock.convert.evaluate import compare
from dlr_lock.convert.mlp_discovery import find_mlps, select_layers
from dlr_lock.convert.mlp_matching import MLP
from dlr_lock.convert.pipeline import distill_modules, fit_chain
from dlr_lock.convert.redistill import FIT_TOKENS, INITS, fit_student, redistill
from dlr_lock.convert.source import compute_dtype, open_source
from dlr_lock.microbench.bench import numbers
from dlr_lock.progress import Steps
from dlr_lock.reporting import Section, Table, print_sections
from dlr_lock.reporting.lock_verdict import Redistillation, undoing_figures
from dlr_lock.runtime.device import usable_device

from .output import target, write_json, write_whole

_OF_CONVERSION = (
    "layers", "depth", "rank", "lanes", "act", "params", "init", "tokens", "batch", "seed", "sequence", "end_to_end",
    "device",
)  # fmt: skip
# What `modules` can vary.
_OF_RECIPE = ("rate", "momentum", "scale", "preconditioner_exponent", "lr_multiplier_b", "weight_decay")
FLOPS = 6  # a parameter and training token: a multiplication and an addition forward, twice that backward


def main(arguments: list[str] | None = None) -> int:
    """Runs the study that the command line asks for; exit status 2, and one line, on bad input."""
    options = _parser().parse_args(arguments)
    try:
        document = machine(usable_device(options.device)) | {"study": options.study, "rows": []}
        document["options"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        for private in ("out", "model", "data", "sentences"):  # paths of this machine
            given = document["options"].pop(private, None)
            if given and private != "out":
                document["options"][private] = Path(given).name
        path = target(document, f"fidelity-{options.study}", options.out)
        with Steps(Console(stderr=True, highlight=False)) as steps:
            for row in _STUDIES[options.study](options, steps):
                document["rows"].append(row)
                write_json(path, document)  # after every row: an interruption costs the one at work
    except (DLRError, OSError, UnicodeError) as error:
        print(f"benchmarks.fidelity: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.fidelity: interrupted; the rows that were finished are written", file=sys.stderr)
        return 130
    _show(document["rows"])
    print(f"written to {path}")
    if options.study == "modules" and (drawn := _plot(document, path.with_suffix(".png"))):
        print(f"written to {drawn}")
    return 0


def modules(options: argparse.Namespace, progress: Steps) -> Iterator[dict[str, Any]]:
    """Rows of layers x training tokens: `Fidelity`, the curve while it was fitted, and the attack at each share."""
    chosen = _options(options)
    given = {name: getattr(options, name) for name in _OF_RECIPE if getattr(options, name) is not None}
    lengths = [replace(chosen, train_tokens=count) for count in numbers(options.train_tokens)]
    shares = _shares(options.redistill)
    with _context(options, chosen, progress) as context:
        for mlp, pairs in context.capture(context.mlps):
            for length in lengths:
                recipe = replace(length.recipe(gated=mlp.gated), **given)
                yield _fit(context, mlp, pairs, replace(recipe, seed=recipe.seed + mlp.layer), shares)


def _fit(
    context: Context, mlp: MLP, pairs: Activations, recipe: Recipe, shares: list[float]
) -> dict[str, Any]:
    spec = context.config.spec_for(mlp.hidden_size, mlp.params)
    seen = DLRNet(spec, dtype=torch.float32)
    curve: list[dict[str, float]] = []
    watching = 0.0
    started = time.monotonic()

    def watch(train_tokens: int, tensors: dict[str, Tensor]) -> None:
        nonlocal watching
        began = time.monotonic()
        seen.assign(tensors)
        now = context.fidelity(seen, pairs).to_dict()
        curve.append({"train_tokens": train_tokens, "seconds": began - started - watching, **now})
        watching += time.monotonic() - began

    title = f"layer {mlp.layer}, {recipe.train_tokens:,} training tokens"
    net = fit_chain(context, mlp, pairs, recipe, title, watch=watch)
    seconds = time.monotonic() - started - watching
    fidelity = context.fidelity(net, pairs)
    attacks: list[Redistillation] = []
    for share in shares:
        for init in INITS:
            attack = redistill(
                net,
                pairs,
                context.train_rows,
                train_tokens=max(1, round(share * recipe.train_tokens)),
                conversion=recipe.train_tokens,
                name=mlp.module,
                device=context.device,
                inits=[init],
                progress=context.count(f"redistilling layer {mlp.layer} at {share:g}, {init} initialisation"),
            )
            attacks.append(attack)
    sample = pairs.rows(random_rows(context.train_rows, FIT_TOKENS, recipe.seed))[0]
    merges, _ = merge_steps(
        net, sample.float(), lambda shorter: context.fidelity(shorter, pairs).rel_error, fidelity.rel_error
    )
    made = [attempt for attack in attacks for attempt in attack.attempts]
    undoing = undoing_figures(made, recipe.train_tokens)
    return {
        "layer": mlp.layer,
        "chain": str(spec),
        **asdict(recipe),
        **fidelity.to_dict(),
        "seconds": seconds,
        "flops": FLOPS * spec.params * recipe.train_tokens,
        "tokens": context.train_rows,
        "curve": curve,
        "attacks": [attack.to_dict() for attack in attacks],
        "merges": [asdict(merge) for merge in merges],
        **{name: figure.to_dict() for name, figure in undoing.items()},
    }


def model(options: argparse.Namespace, progress: Steps) -> Iterator[dict[str, Any]]:
    """A row for each way across the layers, and one more after the end-to-end phase."""
    for across in options.across.split(","):
        yield from _whole(options, progress, across, lambda locked, original, text: {})


def sentences(options: argparse.Namespace, progress: Steps) -> Iterator[dict[str, Any]]:
    """As `model`, with the embeddings of sentences: mean cosine of locked and original, and Spearman's correlation
    of all pairs' similarities."""
    lines = [line for line in options.sentences.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < 3:
        raise DLRError(f"{options.sentences} has {len(lines)} lines: give sentences, one a line")

    def figures(locked: Any, original: Any, tokenizer: Any) -> dict[str, Any]:
        ours, theirs = (embed(m, tokenizer, lines) for m in (locked, original))
        cosines = (ours * theirs).sum(1)
        return {
            "sentences": len(lines),
            "embedding_cosine": cosines.mean().item(),
            "worst_cosine": cosines.min().item(),
            "spearman": spearman(*((e @ e.T)[_pairs(len(lines))] for e in (ours, theirs))),
        }

    yield from _whole(options, progress, options.across, figures)


def embed(model: Any, tokenizer: Any, lines: list[str]) -> Tensor:
    """[N, d] float32 of length 1: the mean of the last hidden states over a sentence's tokens."""
    parts = []
    for begin in range(0, len(lines), 64):
        batch = tokenizer(lines[begin : begin + 64], padding=True, truncation=True, return_tensors="pt")
        batch = batch.to(model.device)
        with frozen(model):
            states = model(**batch)[0].float()
        there = batch["attention_mask"][..., None].float()
        mean = (states * there).sum(1) / there.sum(1)
        parts.append(torch.nn.functional.normalize(mean, dim=1).cpu())
    return torch.cat(parts)


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two samples [N]; ties in the order they come."""
    ranks = [np.argsort(np.argsort(t.numpy(), kind="stable"), kind="stable") for t in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def _pairs(count: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(count, count, 1)
    return rows, columns


def _whole(options: argparse.Namespace, progress: Steps, across: str, more: Any) -> Iterator[dict[str, Any]]:
    train_tokens = numbers(options.train_tokens)
    if len(train_tokens) > 1:
        raise DLRError(f"--train-tokens {options.train_tokens}: only the study of modules takes several")
    shares = _shares(options.redistill)
    chosen = replace(_options(options), train_tokens=train_tokens[0], across=across, redistill=0.0).resolved()
    with _context(options, chosen, progress) as context:
        started = time.monotonic()
        done = distill_modules(context)
        done.chains = {
            name: copy.deepcopy(net) for name, net in done.chains.items()
        }  # before the folder goes
    model, text = context.model, context.text

    def row(phase: str, chains: dict[str, DLRNet]) -> dict[str, Any]:
        seconds = time.monotonic() - started
        locked = with_chains(model, chains, context.identity)
        return {
            "phase": phase,
            "across": done.across,
            "layers": len(context.mlps),
            "seconds": seconds,
            **compare(locked, model, text.heldout).to_dict(),
            **more(locked, model, context.source.tokenizer),
            "gaps": flatten_gaps(locked, chains, text.heldout),
            "students": {
                f"{share:g}": compare(students, model, text.heldout).to_dict()
                for share in shares
                for students in [_redistilled(context, locked, chains, round(share * train_tokens[0]))]
            },
        }

    yield row("modules", done.chains) | {"modules": [r.to_dict() for r in done.reports]}
    if chosen.end_to_end:
        started = time.monotonic()
        losses: list[tuple[int, float]] = []
        chains = train_end_to_end(
            model,
            done.chains,
            context.identity,
            text.train,
            EndToEndPlan(chosen.end_to_end, seed=chosen.seed),
            progress=context.count("end-to-end phase"),
            watch=lambda train_tokens, loss: losses.append((train_tokens, loss)),
        )
        yield row("end_to_end", chains) | {"train_tokens": chosen.end_to_end, "curve": losses}


def _redistilled(context: Context, locked: Any, chains: dict[str, DLRNet], train_tokens: int) -> Any:
    """The locked model with every chain distilled back, on the activations that it gets there."""
    students = {}
    own = capture(
        locked,
        context.mlps,
        context.tokens,
        max_memory=int(context.config.max_memory or 0),
        scratch=context.scratch,
        progress=context.count("activations of the locked model"),
    )
    for mlp, pairs in own:
        students[mlp.module] = fit_student(
            chains[mlp.module].float(),
            pairs,
            context.train_rows,
            train_tokens=max(1, train_tokens),
            init="linear",
            seed=context.config.seed + mlp.layer,
            name=mlp.module,
            device=context.device,
            progress=context.count(f"redistilling layer {mlp.layer}, {train_tokens:,} training tokens"),
        )
    return with_chains(locked, students, [])


_STUDIES = {"modules": modules, "model": model, "sentences": sentences}


def _options(options: argparse.Namespace) -> ConversionConfig:
    given = {name: value for name in _OF_CONVERSION if (value := getattr(options, name, None)) is not None}
    return ConversionConfig(**given, data=str(options.data)).resolved()


@contextmanager
def _context(options: argparse.Namespace, chosen: ConversionConfig, progress: Steps) -> Iterator[Context]:
    """The conversion that is studied: weights in float32, and nothing kept."""
    device = torch.device(str(chosen.device))
    source = open_source(options.model, dtype=compute_dtype(device), device=device)
    text = calibration_text(source, chosen, progress)
    mlps = select_layers(find_mlps(source.model), chosen.layers)
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        resume = ResumeStore(scratch / "kept", {})
        yield Context(source, mlps, text, chosen, torch.float32, resume, scratch, progress)


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
    """Error against training tokens, a line a fit, on logarithmic axes; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for row in document["rows"]:
        line = [(point["train_tokens"], point["rel_error"]) for point in row["curve"]]
        label = f"layer {row['layer']}, {row['train_tokens']:,} training tokens, gap {row['flatten_gap']:.2f}"
        axes.loglog(*zip(*line, strict=True), marker=".", label=label)
    axes.set(xlabel="training tokens", ylabel="relative error on held-out tokens", title=document["device"])
    axes.legend(fontsize="small")
    write_whole(path, partial(figure.savefig, format="png", dpi=120))
    return path


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
        ("model", "lock layers and measure the whole model"),
        ("sentences", "lock a sentence encoder and compare embeddings"),
    ):
        study = studies.add_parser(name, help=about)
        study.add_argument("model", help="a transformers directory, a hub id or a .gguf file")
        study.add_argument("--data", required=True, help="calibration text, as `dlr-lock convert` takes it")
        study.add_argument("--train-tokens", default="409600", help="training tokens of a module")
        for option in _OF_CONVERSION:
            if option != "end_to_end":
                kinds = get_type_hints(ConversionConfig)[option]
                kind = next(kind for kind in (int, float, str) if kind in (kinds, *get_args(kinds)))
                words = help_of(ConversionConfig, option).replace("%", "%%")  # argparse fills in its own
                study.add_argument(flag(option), type=kind, help=words)
        study.add_argument(
            "--out", type=Path, help="folder of the files, instead of one a device under results"
        )
        study.add_argument(
            "--redistill", default="", help="training tokens of attacks, as shares of the fit's: 0.25,1"
        )
        if name == "modules":
            for option in _OF_RECIPE:
                study.add_argument(flag(option), type=float, help="of the recipe, see Recipe")
        else:
            both = "independent,sequential"
            study.add_argument("--across", default=both if name == "model" else "sequential")
            study.add_argument(
                "--end-to-end", type=int, default=0, help="training tokens of the end-to-end phase"
            )
        if name == "sentences":
            study.add_argument("--sentences", type=Path, required=True, help="a file, one sentence a line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
