"""Results as Markdown: a table a kind, short enough for a README. A row whose gate is red shows its error, no time."""

from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any

import torch

from dlr_lock.microbench.bench import cases_of
from dlr_lock.microbench.explain import explain

Row = dict[str, Any]

# What the predictions are of: MLPs of 135M, 1B and 8B models; the default chains, deep ones, and eight lanes.
SHAPES = ("576x1536", "2048x8192", "4096x14336")
CHAINS = ("1", "1x64", "8x64")
TOKENS = (1, 16, 512, 4096)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; all columns but the first are right-aligned."""
    head = f"| {' | '.join(columns)} |"
    rule = f"|{'|'.join(['---', *['---:'] * (len(columns) - 1)])}|"
    return [head, rule, *(f"| {' | '.join(row)} |" for row in rows), ""]


def head(document: Row, what: str) -> list[str]:
    """What a table shows, when and with which versions it was measured."""
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items() if value)
    threads = f" {document['cpu_threads']} threads;" if document["device"].startswith("CPU ") else ""
    driver = f" driver {document['driver']};" if document["driver"] else ""
    stopped = f" Stopped {document['stopped']}." if document["stopped"] else ""
    return [
        f"{what}:{threads}{driver} {document['date'][:10]}; {document['program']}, {versions}.{stopped}",
        "",
    ]


def kernel_cases(document: Row) -> list[tuple[Row | None, Row | None, Row]]:
    """(MLP, chain step by step, the op) of each MLP, token count and chain, in this order, where the op was tried.

    On a GPU the op is `ours` and all are CUDA graphs; on a CPU it is look-ahead and all are eager. Nothing else stands
    in for a row whose gate is red. None: was not tried, such as where the case crashed.
    """
    cpu = document["device"].startswith("CPU ")
    names = (
        ("dense-eager", "naive-eager", "lookahead-eager")
        if cpu
        else ("dense-graph", "naive-graph", "ours-graph")
    )
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in document["rows"]:
        name = ("hidden", "intermediate", "tokens", "lanes", "depth", "rank", "gated", "dtype")
        cases.setdefault(tuple(row[n] for n in name), {})[row["provider"]] = row
    compared = []
    for _, rows in sorted(cases.items()):
        dense, naive, ours = (rows.get(name) for name in names)
        if ours is not None:
            compared.append((dense, naive, ours))
    return compared


def kernels(document: Row) -> list[str]:
    """Of every MLP and token count the chain that does best and the one that does worst."""
    groups: dict[tuple[Any, ...], list[tuple[Row | None, Row | None, Row]]] = {}
    for case in kernel_cases(document):
        groups.setdefault(tuple(case[2][n] for n in ("hidden", "intermediate", "tokens")), []).append(case)
    lines = []
    for cases in groups.values():
        ranked = sorted(cases, key=lambda case: over(case[2], case[0]) or inf)
        for dense, naive, ours in ranked if len(ranked) == 1 else (ranked[0], ranked[-1]):
            forecast = ours["predicted_us"]
            lines.append(
                (
                    f"{ours['hidden']} x {ours['intermediate']}",
                    chain_name(ours),
                    f"{ours['tokens']:,}",
                    _us(dense),
                    _us(naive),
                    _us(ours),
                    _ratio(over(ours, dense)),
                    "-" if ours["error"] is None else f"{ours['error']:.0e}",
                    "-" if forecast is None else f"{forecast:,.0f}",
                )
            )
    what = f"One MLP's place in {document['rows'][0]['dtype']}, microseconds a call on cold weights"
    columns = (
        "MLP",
        "chain",
        "tokens",
        "MLP, us",
        "step by step",
        "look-ahead",
        "to MLP",
        "error",
        "forecast",
    )
    return head(document, what) + table(columns, lines)


def model_steps(document: Row) -> list[tuple[Row | None, Row, float | None]]:
    """Original, locked and the ratio of their times for each step of a model, both by one engine: graph, where either
    side was tried by it, else eager. None: was not tried, such as where the step crashed."""
    steps: dict[tuple[Any, ...], dict[tuple[str, str], Row]] = {}
    for row in document["rows"]:
        name = ("model", "lanes", "depth", "rank", "phase", "batch", "tokens", "context")
        steps.setdefault(tuple(row[n] for n in name), {})[row["engine"], row["side"]] = row
    compared = []
    for rows in steps.values():
        engine = "graph" if any(engine == "graph" for engine, _ in rows) else "eager"
        theirs, ours = rows.get((engine, "original")), rows.get((engine, "locked"))
        if ours is not None:
            compared.append((theirs, ours, over(ours, theirs)))
    return compared


def models(document: Row) -> list[str]:
    """Of each step of a model both sides by one engine."""
    lines = []
    for theirs, ours, ratio in model_steps(document):
        rate = "-" if ours["tokens_per_s"] is None else f"{ours['tokens_per_s']:,.0f}"
        lines.append(
            (
                ours["model"],
                chain_name(ours),
                f"{ours['phase']}, {ours['tokens']:,}",
                _us(theirs),
                _us(ours),
                _ratio(ratio),
                rate,
                "-" if ours["error"] is None else f"{ours['error']:.0e}",
            )
        )
    what = f"Whole models of random weights in {document['rows'][0]['dtype']}, microseconds a step"
    columns = ("model", "chain", "step, tokens", "original, us", "locked, us", "ratio", "tokens/s", "error")
    return head(document, what) + table(columns, lines)


def training(document: Row) -> list[str]:
    """Of each model the plain step and the fastest one, over an inference pass; where that is red, its error."""
    sides: dict[tuple[str, str], list[Row]] = {}
    for row in document["rows"]:
        sides.setdefault((row["model"], row["side"]), []).append(row)
    lines = []
    for (model, side), rows in sides.items():
        timed = {row["strategy"]: row for row in rows if row["step_s"]}
        inference = timed.pop("inference", None)
        best = min(timed.values(), key=lambda row: row["step_s"], default=None)
        if inference is None or best is None:
            tried = next((row for row in rows if row["strategy"] == "inference" and inference is None), None)
            lines.append(
                (model, side, "-" if tried is None else _us(tried | {"median_us": None}), "-", "-", "-")
            )
            continue
        cells = []
        for row in (timed.get("plain"), best):
            peak = "" if not row or row["peak_bytes"] is None else f", {row['peak_bytes'] / 1e9:.1f} GB"
            cells.append(f"{row['step_s'] / inference['step_s']:.1f}{peak}" if row else "failed")
        lines.append((model, side, f"{1e3 * inference['step_s']:,.1f}", *cells, best["strategy"]))
    tokens = document["rows"][0]["tokens"]
    what = f"An eager training step of all weights over an eager inference pass, {tokens:,} tokens"
    columns = ("model", "side", "inference, ms", "plain step", "best step", "best by")
    return head(document, what) + table(columns, lines)


def conversion(document: Row) -> list[str]:
    """A line a conversion."""
    lines = [
        (
            row["model"], f"{row['layers']} of {row['of_layers']}", f"{row['train_tokens']:,}", f"{row['seconds']:,.0f}",
            f"{_number(row['original_loss'], '.3f')} to {_number(row['loss'], '.3f')}", _number(row["kl"], ".3f"),
            _number(row["flips"], ".0%"), _number(row["smallest_gap"], ".2f"),
        )
        for row in document["rows"]
    ]  # fmt: skip
    columns = (
        "model",
        "layers",
        "training tokens of a module",
        "seconds",
        "loss",
        "KL",
        "flips",
        "smallest gap",
    )
    return head(document, f"Conversion on {document['rows'][0]['text']}") + table(columns, lines)


def tests(document: Row) -> list[str]:
    """One line."""
    where = "Tests of the kernels" if document["stage"] == "tests" else "Other tests"
    passed, failed, skipped = (sum(r[n] for r in document["rows"]) for n in ("passed", "failed", "skipped"))
    return head(document, f"{where} on the device: {passed} passed, {failed} failed, {skipped} skipped")


def machine(document: Row) -> list[str]:
    """One line."""
    facts = [
        f"{r['fact']} {r['value']:,.4g} {r['unit']}"
        for r in document["rows"]
        if isinstance(r["value"], float)
    ]
    return head(document, "; ".join(facts))


TABLES: dict[str, Callable[[Row], list[str]]] = {
    "machine": machine,
    "tests": tests,
    "kernels": kernels,
    "models": models,
    "training": training,
    "conversion": conversion,
    "moretests": tests,
}


def predictions() -> list[str]:
    """What the cost model expects of an H200, for MLPs in bfloat16; nothing here was measured."""
    lines = []
    for shape in SHAPES:
        for chain in CHAINS:
            cases = cases_of(shape, chain, TOKENS)
            spec = cases[0].spec
            facts = explain(cases, device=torch.device("cpu"))
            ours = [row[row["choice"]]["predicted_us"] for row in facts["rows"]]
            mlp = [row["dense"]["predicted_us"] for row in facts["rows"]]
            lines.append(
                (
                    shape.replace("x", " x "),
                    f"{spec.lanes}x{spec.depth}x{spec.rank}",
                    *(f"{a:,.0f} / {b:,.0f}" for a, b in zip(ours, mlp, strict=True)),
                )
            )
    columns = ("MLP", "chain", *(f"{count:,} token{'s' if count > 1 else ''}" for count in TOKENS))
    return table(columns, lines)


def chain_name(row: Row) -> str:
    """Lanes x steps x rank."""
    return f"{row['lanes']}x{row['depth']}x{row['rank']}{' gated' if row.get('gated') else ''}"


def over(ours: Row, theirs: Row | None) -> float | None:
    """The ratio of two rows' times, None where either has none."""
    if theirs is None or not theirs["median_us"] or not ours["median_us"]:
        return None
    return ours["median_us"] / theirs["median_us"]


def _us(row: Row | None) -> str:
    if row is None:
        return "-"
    if row["median_us"] is not None:
        return f"{row['median_us']:,.{0 if row['median_us'] >= 100 else 1}f}"
    return f"error {row['error']:.1e}" if row["error"] is not None else "failed"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
