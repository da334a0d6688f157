"""Results as Markdown: a table a kind, short enough for a README. A row whose gate is red shows its error, no time."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from dlr_lock.runtime.bench import chain_cases, sizes
from dlr_lock.runtime.explain import explain

Row = dict[str, Any]

# What the predictions are of: MLPs of 135M, 1B and 8B models, one chain and eight lanes.
SHAPES = ("576x1536", "2048x8192", "4096x14336")
CHAINS = ("1x64", "8x64")
TOKENS = (1, 16, 512, 4096)
_OURS = ("ours", "lookahead", "decode", "prefill")  # families of providers


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


def kernel_cases(document: Row) -> list[list[Row]]:
    """The rows of each MLP, token count and chain, in this order, that have all providers which a line compares."""
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in document["rows"]:
        name = ("hidden", "intermediate", "tokens", "lanes", "depth", "rank", "gated", "dtype")
        cases.setdefault(tuple(row[n] for n in name), []).append(row)
    compared = []
    for _, rows in sorted(cases.items()):
        families = {row["provider"].split("-")[0] for row in rows}
        if families >= {"dense", "naive"} and families & set(_OURS):
            compared.append(rows)
    return compared


def kernels(document: Row) -> list[str]:
    """Of every MLP and token count the chain that does best and the one that does worst, each by its fastest form."""
    groups: dict[tuple[Any, ...], list[list[Row]]] = {}
    for rows in kernel_cases(document):
        groups.setdefault(tuple(rows[0][n] for n in ("hidden", "intermediate", "tokens")), []).append(rows)
    lines = []
    for chains in groups.values():
        ranked = sorted(chains, key=ours_over_dense)
        for rows in ranked if len(ranked) == 1 else (ranked[0], ranked[-1]):
            ours = fastest(rows, *_OURS)
            forecast = next((r["predicted_us"] for r in rows if r["predicted_us"] and r is ours), None)
            lines.append(
                (
                    f"{ours['hidden']} x {ours['intermediate']}",
                    chain_name(ours),
                    f"{ours['tokens']:,}",
                    _us(fastest(rows, "dense")),
                    _us(fastest(rows, "naive")),
                    _us(ours),
                    _ratio(ours_over_dense(rows)),
                    "-" if ours["error"] is None else f"{ours['error']:.0e}",
                    "-" if forecast is None else f"{forecast:,.0f}",
                )
            )
    dtype = document["settings"]["dtype"]
    what = f"One MLP's place in {dtype}, microseconds a call on cold weights"
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


def model_steps(document: Row) -> list[tuple[Row, Row, float | None]]:
    """Original, locked and the ratio of their times for each step of a model, each side by its faster engine."""
    steps: dict[tuple[Any, ...], list[Row]] = {}
    for row in document["rows"]:
        name = ("model", "lanes", "depth", "rank", "phase", "batch", "tokens", "context")
        steps.setdefault(tuple(row[n] for n in name), []).append(row)
    compared = []
    for rows in steps.values():
        theirs, ours = (_fastest([r for r in rows if r["side"] == side]) for side in ("original", "locked"))
        if theirs is None or ours is None:
            continue
        ratio = ours["median_us"] / theirs["median_us"] if ours["median_us"] and theirs["median_us"] else None
        compared.append((theirs, ours, ratio))
    return compared


def models(document: Row) -> list[str]:
    """Of each step of a model the faster engine of either side."""
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
    """Of each model the plain step and the fastest one, over an inference pass."""
    sides: dict[tuple[str, str], list[Row]] = {}
    for row in document["rows"]:
        sides.setdefault((row["model"], row["side"]), []).append(row)
    lines = []
    for (model, side), rows in sides.items():
        timed = {row["policy"]: row for row in rows if row["step_s"]}
        inference = timed.pop("inference", None)
        best = min(timed.values(), key=lambda row: row["step_s"], default=None)
        if inference is None or best is None:
            continue
        cells = []
        for row in (timed.get("plain"), best):
            peak = "" if not row or row["peak_bytes"] is None else f", {row['peak_bytes'] / 1e9:.1f} GB"
            cells.append(f"{row['step_s'] / inference['step_s']:.1f}{peak}" if row else "-")
        lines.append((model, side, f"{1e3 * inference['step_s']:,.1f}", *cells, best["policy"]))
    what = f"A training step of all weights over an inference pass, {document['rows'][0]['tokens']:,} tokens"
    columns = ("model", "side", "inference, ms", "plain step", "best step", "best by")
    return head(document, what) + table(columns, lines)


def conversion(document: Row) -> list[str]:
    """A line a conversion."""
    lines = [
        (
            row["model"], f"{row['layers']} of {row['of_layers']}", f"{row['visits']:,}", f"{row['seconds']:,.0f}",
            f"{row['original_loss']:.3f} to {row['loss']:.3f}", f"{row['kl']:.3f}", f"{100 * row['flips']:.0f}%",
            f"{row['smallest_gap']:.2f}",
        )
        for row in document["rows"]
    ]  # fmt: skip
    columns = ("model", "layers", "visits a module", "seconds", "loss", "KL", "flips", "smallest gap")
    return head(document, f"Conversion on {document['rows'][0]['text']}") + table(columns, lines)


def tests(document: Row) -> list[str]:
    """One line."""
    passed, failed, skipped = (sum(r[n] for r in document["rows"]) for n in ("passed", "failed", "skipped"))
    return head(document, f"Tests on the device: {passed} passed, {failed} failed, {skipped} skipped")


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
}


def predictions() -> list[str]:
    """What the cost model expects of an H200, for MLPs in bfloat16; nothing here was measured."""
    lines = []
    for shape in SHAPES:
        for chain in CHAINS:
            lanes, depth = sizes(chain, 2)
            cases = chain_cases(*sizes(shape, 2), lanes=lanes, depth=depth, tokens=TOKENS)
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


def fastest(rows: list[Row], *families: str) -> Row:
    """The fastest accurate row of these families of providers; where all gates are red, the first of them."""
    own = [r for family in families for r in rows if r["provider"].split("-")[0] == family]
    return _fastest(own) or own[0]


def _fastest(rows: list[Row]) -> Row | None:
    timed = [r for r in rows if r["median_us"]]
    return min(timed, key=lambda r: r["median_us"]) if timed else next(iter(rows), None)


def ours_over_dense(rows: list[Row]) -> float:
    """The time of a case's chain, by its fastest form, over its MLP's; infinite where a gate is red."""
    ours, dense = fastest(rows, *_OURS), fastest(rows, "dense")
    return (
        ours["median_us"] / dense["median_us"] if ours["median_us"] and dense["median_us"] else float("inf")
    )


def chain_name(row: Row) -> str:
    """Lanes x steps x rank."""
    return f"{row['lanes']}x{row['depth']}x{row['rank']}{' gated' if row.get('gated') else ''}"


def _us(row: Row) -> str:
    if row["median_us"] is not None:
        return f"{row['median_us']:,.{0 if row['median_us'] >= 100 else 1}f}"
    return f"error {row['error']:.1e}" if row["error"] is not None else "failed"


def _ratio(value: float | None) -> str:
    return "-" if value is None or value == float("inf") else f"{value:.2f}"
