"""Results as tables for a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from .audit.demo import DemoResult
from .convert import ConversionConfig, ConversionReport, Evaluation
from .convert.config import EFFORTS
from .convert.evaluate import StateEvaluation
from .convert.report import evaluation_words, lock_status, redistillation_words


def choices(options: ConversionConfig) -> str:
    """One line: what a conversion will do."""
    shape = (
        "depth and rank to match"
        if not (options.depth and options.rank)
        else f"{options.depth}x{options.rank}"
    )
    memory = int(options.max_memory or 0) / 2**30
    return (
        f"effort {options.effort} (on a CPU {EFFORTS[options.effort].words}): {options.tokens:,} tokens of "
        f"{options.data}; {options.train_tokens:,} training tokens a module in batches of {options.batch:,}, "
        f"{options.end_to_end:,} of all chains at once; layers {options.layers or 'all'}; {options.lanes} lane(s), {shape}; "
        f"{options.init} initialisation; on {options.device}, {memory:.1f} GiB for activations"
    )


def print_report(console: Console, report: ConversionReport) -> None:
    """The modules, the fidelity and the totals of a conversion."""
    columns = ["module", "chain", "relative\nerror", "flatten\ngap", "coupling", "hidden\nstates", "seconds"]
    attacked = any(m.redistillation for m in report.modules)
    table = _table(*columns, *(["undoing it"] if attacked else []))
    for m in report.modules:
        gap = f"{m.fidelity.flatten_gap:.2f}" + ("" if m.fidelity.locked else " NOT LOCKED")
        table.add_row(
            m.module, str(m.spec), f"{m.fidelity.rel_error:.4f}", gap, f"{m.fidelity.coupling:.2f}",
            "-" if m.drift is None else f"{m.drift:.4f}", f"{m.seconds:.0f}",
            *([redistillation_words(m.redistillation)] if attacked else []),
        )  # fmt: skip
    console.print(table)
    if isinstance(report.evaluation, StateEvaluation):
        console.print(evaluation_words(report.evaluation))
    else:
        print_evaluation(console, report.evaluation)
    if report.end_to_end:
        t = report.end_to_end
        console.print(
            f"before {t.train_tokens:,} training tokens of the end-to-end phase: {evaluation_words(t.evaluation_before)} "
            f"Smallest flatten gap, over |chain|^2: {t.smallest_gap_before:.2f}, then {t.smallest_gap_after:.2f}"
        )
    for warning in report.warnings:
        console.print(f"note: {warning}", markup=False)
    ratio = report.params_locked / report.params_original
    console.print(
        f"parameters {report.params_locked:,} (original {report.params_original:,}, ratio {ratio:.4f}); "
        f"{len(report.modules)} of {report.mlps} MLPs converted in {report.seconds:.0f} s, "
        f"{report.modules[0].train_tokens:,} training tokens each"
    )
    for m in report.modules:
        if abs(m.spec.params / m.params_original - 1) > 0.01:
            console.print(f"{m.module}: {m.spec.params:,} parameters instead of {m.params_original:,}")
    console.print(lock_status(report))


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Loss and perplexity, beside the original's where it is known."""
    table = _table("held-out text", "locked", "original", "difference")
    e = evaluation
    if e.original_loss is None or e.loss_gap is None or e.kl is None or e.flips is None:
        table.add_row("loss (nats a token)", f"{e.loss:.4f}", "-", "-")
        table.add_row("perplexity", f"{e.perplexity:.2f}", "-", "-")
    else:
        table.add_row("loss (nats a token)", f"{e.loss:.4f}", f"{e.original_loss:.4f}", f"{e.loss_gap:+.4f}")
        table.add_row("perplexity", f"{e.perplexity:.2f}", f"{e.original_perplexity:.2f}", "")
        table.add_row("KL to the original (nats)", "", "", f"{e.kl:.4f}")
        table.add_row("likeliest token flipped", "", "", f"{100 * e.flips:.1f}%")
    console.print(table)
    console.print(f"over {e.tokens:,} tokens")


def print_facts(console: Console, facts: dict[str, Any]) -> None:
    """What `inspect` found."""
    conversion = facts.get("conversion", {})
    measured = {m["module"]: m for m in conversion.get("modules", [])}
    table = _table("module", "chain", "relative\nerror", "flatten\ngap")
    for name, spec in facts["lock"]["modules"].items():
        m = measured.get(name)
        chain = (
            f"{spec['lanes']}x{spec['depth']}x{spec['rank']} {spec['act']}{' gated' if spec['gated'] else ''}"
        )
        gap = "-" if m is None else f"{m['flatten_gap']:.2f}" + ("" if m["locked"] else " NOT LOCKED")
        table.add_row(name, chain, "-" if m is None else f"{m['rel_error']:.4f}", gap)
    console.print(table)
    if conversion:
        console.print(
            f"{facts['program']}, from {conversion['source']} (fingerprint {conversion['fingerprint'][:16]}); "
            f"{len(measured)} of {conversion['mlps']} MLPs; {len(facts['files'])} files"
        )
    else:
        console.print("no manifest: this checkpoint was saved again after its conversion")


def print_demo(console: Console, result: DemoResult) -> None:
    """What the demo kept, and what training now costs."""
    print_report(console, result.report)
    locked, original = result.locked, result.original
    table = _table(f"on {locked.tokens} tokens", "locked", "original", "ratio")
    for what, a, b, unit in (
        ("inference pass, seconds", locked.forward, original.forward, ".3f"),
        ("training step, seconds", locked.step, original.step, ".3f"),
        ("activations saved for backward, MB", locked.saved / 1e6, original.saved / 1e6, ".1f"),
        ("  in one locked MLP's place, MB", result.slot_locked / 1e6, result.slot_original / 1e6, ".1f"),
    ):
        table.add_row(what, format(a, unit), format(b, unit), f"{a / b:.2f}")
    console.print(table)
    console.print(f"\n[bold]{result.prompt}[/bold]")
    console.print("locked:   " + result.completion_locked.strip(), markup=False)
    console.print("original: " + result.completion_original.strip(), markup=False)
    console.print(
        f"\n{len(result.report.modules)} of {result.layers} MLPs are locked"
        + (
            f"; the checkpoint is {result.kept}"
            if result.kept
            else " (a demonstration: locking all of them takes longer)"
        )
    )


def print_benchmark(console: Console, document: dict[str, Any]) -> None:
    """The rows of a benchmark, a table a case; columns that no row fills are left out."""
    rates = document["measured_rates"]
    console.print(
        f"{document['device']}, {document['settings']['dtype']}; copies at {rates['copy_gb_per_s']:,.0f} GB/s, "
        f"products at {rates['matmul_tflop_per_s']:,.2f} TFLOP/s"
    )
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in document["rows"]:
        case = (
            f"{row['tokens']} token{'s' if row['tokens'] > 1 else ''}; MLP {row['hidden']} x {row['intermediate']}, "
            f"chain {row['lanes']}x{row['depth']}x{row['rank']}{' gated' if row['gated'] else ''} of "
            f"{row['params_ratio']:.3f} its parameters"
        )
        cases.setdefault(case, []).append(row)
    for case, rows in cases.items():
        console.print(f"\n[bold]{case}[/bold]")
        cells = [_benchmark_cells(row) for row in rows]
        names = [name for name in cells[0] if any(cell[name] for cell in cells)]
        table = _table(*names, rules=False)
        for cell in cells:
            table.add_row(*(cell[name] or "-" for name in names))
        console.print(table)
        for row in rows:
            if not row["accurate"]:
                reason = row["error_message"] or f"error {row['error']:.1e} over {row['error_limit']:.1e}"
                console.print(f"{row['provider']}: {reason}", markup=False)
    if document["stopped"]:
        console.print(f"\nstopped {document['stopped']}", markup=False)


def _benchmark_cells(row: dict[str, Any]) -> dict[str, str]:
    """Column to text, empty where the row has no such number."""

    def text(name: str, form: str, unit: str = "") -> str:
        return "" if row[name] is None else format(row[name], form) + unit

    median = row["median_us"]
    spread = "" if median is None else f"{100 * (row['p80_us'] - row['p20_us']) / median:.0f}%"
    return {
        "provider": row["provider"],
        "error": text("error", ".1e"),
        "us": text("median_us", ",.1f"),
        "p20 to\np80": spread,
        "to\ndense": text("ratio_to_dense", ".2f"),
        "copy\nrate": text("copy_percent", ".0f", "%"),
        "product\nrate": text("matmul_percent", ".0f", "%"),
        "launches": text("launches", "d"),
        "forecast\nus": text("predicted_us", ",.1f"),
    }


def print_explanation(console: Console, facts: dict[str, Any]) -> None:
    """Floor, forecasts and choice for each token count, with the constants that they rest on."""
    device, chain, gram = facts["device"], facts["chain"], facts["gram"]
    if facts["assumed"]:
        console.print(f"no GPU here: the constants are those of an {device['name']}")
    console.print(
        f"chain {chain['lanes']}x{chain['depth']}x{chain['rank']} {chain['act']}{' gated' if chain['gated'] else ''} "
        f"on {chain['hidden_size']} features, {facts['dtype']}; Gram blocks of m = {gram['m']} ({gram['S']} steps), "
        f"{gram['bytes'] / 1e6:.1f} MB, solved {facts['solve_columns']} columns at a time"
    )
    table = _table(
        "tokens", "path", "choice", "us", "floor\nus", "rounds", "launches", "m", "S", "CTAs\na lane", "warps",
        rules=False,
    )  # fmt: skip
    for row in facts["rows"]:
        for path in ("dense", "decode", "prefill"):
            if (f := row[path]) is None:
                table.add_row(str(row["tokens"]), path, "", "-")
                continue
            table.add_row(
                str(row["tokens"]), path, "yes" if path == row["choice"] else "", f"{f['predicted_us']:.1f}",
                f"{f['floor_us']:.1f}", str(f["rounds"]), str(f["launches"]),
                *(str(f.get(name, "")) for name in ("m", "S", "ctas_a_lane", "num_warps")),
            )  # fmt: skip
    console.print(table)
    console.print(
        f"{device['name']}: {device['sms']} multiprocessors; memory {device['bandwidth'] / 1e9:,.0f} GB/s, products "
        f"{device['flops'] / 1e12:,.0f} TFLOP/s, L2 to a multiprocessor {device['sm_bandwidth'] / 1e9:.0f} GB/s, "
        f"additions in L2 {device['atomics'] / 1e9:,.0f} GB/s; launch {1e6 * device['launch']:.2f} us, barrier "
        f"{1e6 * device['barrier']:.2f} us, step {1e6 * device['step']:.2f} us; persistent grids: "
        f"{'yes' if device['cooperative'] else 'no'}"
    )


def _table(*columns: str, rules: bool = True) -> Table:
    """A table; without rules there is room for many columns in 80."""
    table = Table() if rules else Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table
