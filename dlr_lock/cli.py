"""The command line: parses arguments, shows progress and results, and words errors. No logic of its own.

What takes torch is imported by the commands themselves: a page of help takes neither it nor transformers.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .audit.config import AuditConfig
from .common.environment import QUIET, set_defaults
from .common.version import __version__
from .compare.config import SpeedConfig
from .convert.config import ConversionConfig
from .convert.parallel.ranks import joined, leave, several
from .exits import STOPS, end_with_the_others, interrupt, one_line_errors, what_is_kept
from .options import choice, one_of, options_of
from .planning.config import LayersConfig
from .planning.gpus import NAMES
from .progress import Steps
from .reporting import Section, print_sections

app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Publish the weights of language models so that they can be run, and are expensive to fine-tune.",
)
_screen = Console(stderr=True, highlight=False)  # progress and words; standard output is for results

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")
]
Device = Annotated[str | None, choice("cpu, cuda, cuda:1, ...", "the best there is")]
_MODELS_OWN = "as the model's generation config says"
Locked = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A locked checkpoint's directory.")]


@app.callback()
def _start(
    context: typer.Context,
    version: Annotated[bool, choice("Print the version and stop.", None, "--version")] = False,
) -> None:
    if version:
        print(f"dlr-lock {__version__}")
        raise typer.Exit
    if several() and context.invoked_subcommand not in (None, "convert"):
        from .common.errors import DLRError

        raise DLRError(f"{context.invoked_subcommand} runs in one process: start it without torchrun")
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@app.command()
def demo(
    layers: Annotated[
        str | None, choice("Layers to lock, such as 12-15.", "a few on a CPU, all on a GPU")
    ] = None,
    out: Annotated[Path | None, choice("Keep the locked checkpoint here.", "it is thrown away")] = None,
    device: Device = None,
) -> None:
    """Fetch a small real model, lock some of its layers, measure, and complete a sentence with both."""
    from .audit.demo import demo_sections, run_demo

    with Steps(_screen) as steps:
        result = run_demo(layers=layers, out=out, device=device, progress=steps, say=_screen.print)
    _print(demo_sections(result))


@app.command()
@options_of(ConversionConfig)
def convert(
    source: Annotated[str, typer.Argument(help="A transformers directory, a hub id or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="The directory to write the locked checkpoint to.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a locked checkpoint.")] = False,
    log_dir: Annotated[
        Path | None,
        choice("Write figures of the work into this folder as it goes on, for TensorBoard.", "none"),
    ] = None,
    as_json: Json = False,
    **config: Any,
) -> None:
    """Lock a model: replace its MLPs by DLR-Nets of as many parameters, fitted to them."""
    from .convert import convert_model
    from .convert.report import choices, conversion_sections

    if not as_json:
        _screen.print(choices(ConversionConfig(**config).resolved()), markup=False)
    with what_is_kept(), Steps(_screen) as steps:
        report = convert_model(source, out, overwrite=overwrite, progress=steps, log_dir=log_dir, **config)
    if as_json:
        _print_json(report.to_dict())
    else:
        _print(conversion_sections(report)[::-1])
        print(f"written to {out}")
        if report.not_the_original:
            Console(highlight=False).print(
                f"Warning: {report.not_the_original}.", style="bold red", markup=False
            )


@app.command()
@options_of(ConversionConfig)
def plan(
    source: Annotated[str, typer.Argument(help="A transformers directory or a hub id.")],
    device: Annotated[
        str | None,
        choice(f"cpu, cuda, ..., or a GPU that is not here: {NAMES}.", "the best there is"),
    ] = None,
    gpus: Annotated[
        int | None, choice("So many of these GPUs, in one machine, by torchrun; see --across.", "one process")
    ] = None,
    as_json: Json = False,
    **config: Any,
) -> None:
    """Say what a conversion will take: time, memory, disk and FLOPs, by phase; the weights are not read."""
    from .planning.plan import plan_conversion
    from .planning.sections import plan_sections

    made = plan_conversion(source, device=device, gpus=gpus, **config)
    if as_json:
        _print_json(made.to_dict())
    else:
        _print(plan_sections(made))


@app.command()
@options_of(LayersConfig)
def layers(
    source: Annotated[str, typer.Argument(help="A transformers directory, a hub id or a .gguf file.")],
    as_json: Json = False,
    **config: Any,
) -> None:
    """Say what locking each layer would cost the model, and some of them together, from one backward pass."""
    from .planning.layers import cost_sections, costs_of, foretold_of

    named = LayersConfig.of(config).layers
    with Steps(_screen) as steps:
        costs = costs_of(source, progress=steps, **config)
    if as_json:
        together = foretold_of(costs, named).to_dict()
        _print_json({"layers": [cost.to_dict() for cost in costs], "together": together})
    else:
        _print(cost_sections(source, costs, named))


@app.command()
def inspect(checkpoint: Locked, as_json: Json = False) -> None:
    """Say what a locked checkpoint is: its chains, how it was made and what was measured then."""
    from .convert.report import facts_sections
    from .runtime import inspect as inspect_checkpoint

    facts = inspect_checkpoint(checkpoint)
    if as_json:
        _print_json(facts)
    else:
        _print(facts_sections(facts))


@app.command()
def verify(checkpoint: Locked, as_json: Json = False) -> None:
    """Compare every file of a locked checkpoint with the manifest's hashes."""
    from .common.errors import DLRError
    from .runtime import verify as verify_checkpoint

    faults = verify_checkpoint(checkpoint)
    if as_json:
        _print_json({"ok": not faults, "faults": faults})
    if faults:
        raise DLRError(f"{checkpoint} is not what was written: {'; '.join(faults)}")
    if not as_json:
        print(f"{checkpoint}: every file is as it was written")


@app.command("eval")
def evaluate(
    context: typer.Context,
    checkpoint: Locked,
    text: Annotated[
        list[str] | None,
        choice(
            "Text to evaluate on: .txt, .jsonl, .parquet or a datasets name; several times for several.",
            "none",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        choice("Instead of a text: tasks of lm-evaluation-harness, such as arc_easy,hellaswag.", "none"),
    ] = None,
    original: Annotated[str | None, choice("The original model, for KL and flips.", "none")] = None,
    tokens: Annotated[int, choice("Tokens of each text to use, at most.")] = 10_240,
    skip: Annotated[
        int, choice("Tokens of each text to leave out before, such as those that the model was converted on.")
    ] = 0,
    include_path: Annotated[Path | None, choice("A folder with more tasks, .yaml files.", "none")] = None,
    limit: Annotated[int | None, choice("Questions of each task to ask, at most.", "all")] = None,
    shots: Annotated[int | None, choice("Worked examples before each question.", "as the task says")] = None,
    batch: Annotated[int, choice("Sequences of a task in a pass.")] = 8,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure loss and perplexity on texts, or scores on tasks; with an original, KL, flips and its own scores."""
    one_of(context, {"text": ("tokens", "skip"), "tasks": ("include_path", "limit", "shots", "batch")})
    if tasks is not None:
        _evaluate_tasks(
            checkpoint, tasks, as_json, original=original, include_path=include_path, limit=limit, shots=shots,
            batch=batch, device=device,
        )  # fmt: skip
        return
    from .convert.evaluate import pooled
    from .convert.report import evaluation_section, texts_section
    from .convert.use import evaluate_texts

    names = text or []
    with Steps(_screen) as steps:
        found = evaluate_texts(
            checkpoint, names, original=original, tokens=tokens, skip=skip, device=device, progress=steps
        )
    together = pooled(found)
    if as_json:
        each = [{"text": name, **e.to_dict()} for name, e in zip(names, found, strict=True)]
        _print_json(together.to_dict() | {"skipped": skip, "texts": each})
    else:
        several = [texts_section(dict(zip(names, found, strict=True)))] if len(found) > 1 else []
        _print([*several, evaluation_section(together)])


def _evaluate_tasks(checkpoint: Path, tasks: str, as_json: bool, **choices: Any) -> None:
    from .compare.sections import tasks_sections
    from .compare.tasks import evaluate_tasks

    with Steps(_screen) as steps:
        scores = evaluate_tasks(
            checkpoint, [name.strip() for name in tasks.split(",")], progress=steps, **choices
        )
    if as_json:
        _print_json({"tasks": [score.to_dict() for score in scores]})
    else:
        _print(tasks_sections(scores))


@app.command()
@options_of(AuditConfig)
def audit(
    checkpoint: Locked,
    original: Annotated[str, choice("The model that was locked.")],
    out: Annotated[Path | None, choice("Folder for audit.json and audit.html.", "CHECKPOINT-audit")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an audit.")] = False,
    as_json: Json = False,
    **config: Any,
) -> None:
    """Attack a locked checkpoint as an informed engineer would, and say what each attack costs."""
    from .audit import audit_model
    from .audit.sections import audit_sections

    here = (checkpoint if checkpoint.is_dir() else Path(checkpoint.name)).resolve()  # or a name on the hub
    folder = out or here.with_name(f"{here.name}-audit")
    with what_is_kept(), Steps(_screen) as steps:
        report = audit_model(checkpoint, original, folder, overwrite=overwrite, progress=steps, **config)
    if as_json:
        _print_json(report.to_dict())
    else:
        _print(audit_sections(report))
        print(f"written to {folder / 'audit.html'} and audit.json beside it")


@app.command()
def generate(
    checkpoint: Locked,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    compare: Annotated[str | None, choice("Also complete with this original model.", "none")] = None,
    max_new_tokens: Annotated[int, choice("Tokens to generate at most.")] = 100,
    temperature: Annotated[float, choice("0 for the likeliest token every time.")] = 0.0,
    top_p: Annotated[
        float | None, choice("Sample among the likeliest tokens with this share of the chances.", _MODELS_OWN)
    ] = None,
    top_k: Annotated[
        int | None, choice("Sample among so many of the likeliest tokens; 0 for all.", _MODELS_OWN)
    ] = None,
    repetition_penalty: Annotated[
        float | None, choice("Above 1, tokens that are there already are less likely.", _MODELS_OWN)
    ] = None,
    seed: Annotated[int, choice("Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    system: Annotated[
        str | None, choice("A system prompt, through the chat template with the prompt.", "none")
    ] = None,
    device: Device = None,
) -> None:
    """Complete a text with a locked model, as it is being generated."""
    from .convert import complete
    from .convert.use import check_models

    def emit(piece: str) -> None:
        print(piece, end="", flush=True)

    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
        "repetition_penalty": repetition_penalty, "seed": seed, "chat": chat, "system": system, "device": device,
        "emit": emit,
    }  # fmt: skip
    if compare is not None:
        check_models(compare)  # before the first completion, not after it
        print("--- locked")
    complete(checkpoint, prompt, **settings)
    print()
    if compare is not None:
        print("--- original")
        complete(compare, prompt, **settings)
        print()


@app.command()
def serve(
    checkpoint: Annotated[str, typer.Argument(help="A locked checkpoint's directory or name on the hub.")],
    flags: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ENGINE FLAGS]", help="For the engine, as they are.")
    ] = None,
    engine: Annotated[
        str | None,
        choice("vllm or transformers.", "vLLM where it is installed, else transformers' own server"),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare the files with the manifest's hashes first.")
    ] = False,
) -> None:
    """Serve a locked model over the OpenAI API, by vLLM or by transformers' own server."""
    from .runtime.serving import prepare_server

    server = prepare_server(checkpoint, engine=engine, hashes=not no_verify, flags=flags)
    _screen.print(f"{checkpoint}: served by {server.engine} {server.version}", markup=False)
    server.become()


_bench = typer.Typer(invoke_without_command=True)
app.add_typer(_bench, name="bench")


@_bench.callback()
def bench(
    context: typer.Context,
    hidden: Annotated[int, choice("Features of the model, d.")] = 576,
    intermediate: Annotated[int, choice("Hidden units of the gated MLP to compare with.")] = 1536,
    lanes: Annotated[int, choice("Chains side by side.")] = 1,
    depth: Annotated[
        int | None,
        choice("Steps of a chain, near to this at equal parameters.", "by size, as a conversion chooses"),
    ] = None,
    rank: Annotated[
        int | None, choice("Rank of a step, a multiple of 16.", "what equal parameters leave")
    ] = None,
    tokens: Annotated[str, choice("Token counts, such as 1,16,512.")] = "1,16,512",
    dtype: Annotated[
        str, choice("auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16, float16.")
    ] = "auto",
    device: Device = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Time nothing: print the cost model's floor, forecast and choice."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Time one MLP against the DLR-Net in its place, or explain which kernels would run it and why; `bench model`
    times whole models."""
    if context.invoked_subcommand is not None:
        return
    from .microbench.bench import chain_cases, numbers, run
    from .microbench.explain import explain as explain_cases
    from .microbench.sections import benchmark_sections, explanation_sections
    from .runtime.device import usable_device

    cases = chain_cases(hidden, intermediate, lanes=lanes, depth=depth, rank=rank, tokens=numbers(tokens))
    place = usable_device(device)
    if explain:
        facts = explain_cases(cases, device=place, dtype=dtype)
    else:
        with Steps(_screen) as steps:
            facts = run(cases, device=place, dtype=dtype, progress=steps)
    if as_json:
        _print_json(facts)
    else:
        _print((explanation_sections if explain else benchmark_sections)(facts))


@_bench.command("model")
@options_of(SpeedConfig)
def bench_model(
    checkpoint: Locked,
    original: Annotated[str, choice("The model that was locked.")],
    as_json: Json = False,
    **config: Any,
) -> None:
    """Time a locked model against its original: first token, prefill, decoding and memory, in turns."""
    from .compare.bench import bench_model
    from .compare.sections import speed_sections

    with Steps(_screen) as steps:
        document = bench_model(checkpoint, original, progress=steps, **config)
    if as_json:
        _print_json(document)
    else:
        _print(speed_sections(document))


def main() -> None:
    """Runs the command line. Exit status 2, and one line on standard error, for all that the user can correct."""
    set_defaults(QUIET)
    for name in STOPS:  # a stopped job cleans up like one that is interrupted
        signal.signal(getattr(signal, name), interrupt)
    with one_line_errors():
        _join()
        result = app(standalone_mode=False)
        if result == 130:  # typer's own way to say KeyboardInterrupt
            raise KeyboardInterrupt
        leave()
        sys.exit(result if isinstance(result, int) else 0)


def _join() -> None:
    """Where a launcher started several processes: finds them, before anything can fail; the first one alone speaks."""
    if not several():
        return
    # Or it tells of connections that close, with the C++ stack of each.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    end_with_the_others()
    if not joined().first:
        _screen.quiet = True
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the end)


def _print(sections: list[Section]) -> None:
    print_sections(Console(highlight=False), sections)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))
