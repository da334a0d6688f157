"""The command line: parses arguments, shows progress and results, and words errors. No logic of its own."""

import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from .audit.config import RENAMED as RENAMED_AUDIT
from .audit.config import AuditConfig
from .convert.config import RENAMED, ConversionConfig
from .options import options_of
from .progress import Steps
from .reporting import Section, print_sections

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Publish the weights of language models so that they can be run, and are expensive to fine-tune.",
)
_screen = Console(stderr=True, highlight=False)  # progress and words; standard output is for results

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the best there is by default.")]
Locked = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A locked checkpoint's directory.")]


@app.command()
def demo(
    layers: Annotated[str | None, typer.Option(help="Layers to lock; a few on a CPU, all on a GPU.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the locked checkpoint here.")] = None,
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
    as_json: Json = False,
    **config: Any,
) -> None:
    """Lock a model: replace its MLPs by DLR-Nets of as many parameters, fitted to them."""
    from .convert import convert_model
    from .convert.report import choices, conversion_sections

    if not as_json:
        _screen.print(choices(ConversionConfig(**config).resolved()), markup=False)
    with _said_words(), Steps(_screen) as steps:
        report = convert_model(source, out, overwrite=overwrite, progress=steps, **config)
    if as_json:
        _print_json(report.to_dict())
    else:
        _print(conversion_sections(report)[::-1])
        print(f"written to {out}")


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
    checkpoint: Locked,
    text: Annotated[
        str, typer.Option(help="Text to evaluate on: .txt, .jsonl, .parquet or a datasets name.")
    ],
    original: Annotated[str | None, typer.Option(help="The original model, for KL and flips.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use, at most.")] = 10_240,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure loss and perplexity on a text, and KL and flips against the original."""
    from .convert import evaluate_checkpoint
    from .convert.report import evaluation_section

    with Steps(_screen) as steps:
        evaluation = evaluate_checkpoint(
            checkpoint, text, original=original, tokens=tokens, device=device, progress=steps
        )
    if as_json:
        _print_json(evaluation.to_dict())
    else:
        _print([evaluation_section(evaluation)])


@app.command()
@options_of(AuditConfig)
def audit(
    checkpoint: Locked,
    original: Annotated[str, typer.Option(help="The model that was locked.")],
    out: Annotated[
        Path | None, typer.Option(help=r"Folder for audit.json and audit.html.  \[default: CHECKPOINT-audit]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an audit.")] = False,
    as_json: Json = False,
    **config: Any,
) -> None:
    """Attack a locked checkpoint as an informed engineer would, and say what each attack costs."""
    from .audit import audit_model
    from .audit.sections import audit_sections

    folder = out or checkpoint.resolve().with_name(f"{checkpoint.resolve().name}-audit")
    with _said_words(), Steps(_screen) as steps:
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
    compare: Annotated[str | None, typer.Option(help="Also complete with this original model.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 for the likeliest token every time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    device: Device = None,
) -> None:
    """Complete a text with a locked model, as it is being generated."""
    from .convert import complete

    def emit(piece: str) -> None:
        print(piece, end="", flush=True)

    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "chat": chat, "device": device,
    }  # fmt: skip
    if compare:
        print("--- locked")
    complete(checkpoint, prompt, emit=emit, **settings)
    print()
    if compare:
        print("--- original")
        complete(compare, prompt, emit=emit, **settings)
        print()


@app.command()
def bench(
    hidden: Annotated[int, typer.Option(help="Features of the model, d.")] = 576,
    intermediate: Annotated[int, typer.Option(help="Hidden units of the gated MLP to compare with.")] = 1536,
    lanes: Annotated[int, typer.Option(help="Chains side by side.")] = 1,
    depth: Annotated[
        int | None, typer.Option(help="Steps of a chain, near to this at equal parameters.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of a step, a multiple of 16.")] = None,
    tokens: Annotated[str, typer.Option(help="Token counts, such as 1,16,512.")] = "1,16,512",
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16, float16.")
    ] = "auto",
    device: Device = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Time nothing: print the cost model's floor, forecast and choice."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Time one MLP against the DLR-Net in its place, or explain which kernels would run it and why."""
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


def main() -> None:
    """Runs the command line. Exit status 2, and one line on standard error, for all that the user can correct."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disable_progress_bar()  # transformers' own, beside ours
    for name in ("SIGTERM", "SIGHUP"):  # a stopped job cleans up like one that is interrupted
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _interrupt)
    with _one_line_errors():
        result = app(standalone_mode=False)
        if result == 130:  # typer's own way to say KeyboardInterrupt
            raise KeyboardInterrupt
        sys.exit(result if isinstance(result, int) else 0)


@contextmanager
def _said_words():
    """An interruption that says what is kept; typer would drop the words."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not str(stop):
            raise
        _fail(str(stop))


@contextmanager
def _one_line_errors():
    try:
        yield
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; nothing was written")
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left: no more to say to anyone
        sys.exit(0)
    except Exception as error:
        from .common.errors import DLRError

        if hasattr(error, "format_message"):  # click's own errors, which newer typers carry a copy of
            unknown = getattr(error, "option_name", None)
            _fail(_RENAMED.get(str(unknown).lstrip("-").replace("-", "_")) or error.format_message())
        if not isinstance(error, DLRError | MemoryError) and "out of memory" not in str(error):
            raise
        _fail(str(error) or "out of memory: use a smaller --batch or --max-memory")


def _fail(message: str) -> None:
    print(f"dlr-lock: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


_RENAMED = RENAMED_AUDIT | RENAMED


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _print(sections: list[Section]) -> None:
    print_sections(Console(highlight=False), sections)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))
