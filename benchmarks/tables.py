"""Results as Markdown: a table a kind, short enough for a README. A row whose gate is red shows its error, no time."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dlr_lock.convert.config import EFFORTS
from dlr_lock.microbench.bench import cases_of
from dlr_lock.microbench.explain import explain
from dlr_lock.reporting import Table, grouped, headings
from dlr_lock.reporting.markdown import table
from dlr_lock.reporting.words import bytes_words, cell, chain_name, count_words

Row = dict[str, Any]

# What the predictions are of: MLPs of 135M, 1B and 8B models; the default chains, deep ones, and eight lanes.
SHAPES = ("576x1536", "2048x8192", "4096x14336")
CHAINS = ("1", "1x64", "8x64")
TOKENS = (1, 16, 512, 4096)
MISSED = 1.3  # what was measured over what was forecast, from which on the cost model is wrong


def head(document: Row, what: str, columns: str = "", rows: Sequence[Sequence[str]] = ()) -> list[str]:
    """What a table shows, when and with which versions it was measured; then the table, if there is one."""
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items() if value)
    threads = (
        f" {count_words(document['cpu_threads'], 'thread')};" if document["device"].startswith("CPU ") else ""
    )
    driver = f" driver {document['driver']};" if document["driver"] else ""
    stopped = f" Stopped {document['stopped']}." if document["stopped"] else ""
    measured = (
        f"{what}:{threads}{driver} {document['date'][:10]}; {document['program']}, {versions}.{stopped}"
    )
    return [measured, "", *(table(Table(headings(columns), rows)) if columns else [])]


def kernel_cases(document: Row) -> list[tuple[Row | None, Row | None, Row]]:
    """(MLP, chain step by step, the op) of each MLP, token count and chain, in this order, where the op was tried.

    On a GPU all are CUDA graphs, on a CPU eager. Nothing else stands in for a row whose gate is red. None: was not
    tried, such as where the case crashed.
    """
    op = _op(document)
    names = [f"{family}-{op.split('-')[1]}" for family in ("dense", "naive")] + [op]
    fields = "hidden", "intermediate", "tokens", "lanes", "depth", "rank", "dtype"
    compared = []
    for _, case in sorted(grouped(document["rows"], lambda row: tuple(row[n] for n in fields)).items()):
        rows = {row["provider"]: row for row in case}
        dense, naive, ours = (rows.get(name) for name in names)
        if ours is not None:
            compared.append((dense, naive, ours))
    return compared


def _op(document: Row) -> str:
    """The provider that stands for the op."""
    if not document["device"].startswith("CPU "):
        return "ours-graph"
    tried = any(row["provider"] == "ours-eager" for row in document["rows"])
    return "ours-eager" if tried else "lookahead-eager"  # all that files of 0.1 have on a CPU


def kernels(document: Row) -> list[str]:
    """Of every MLP and token count the chain that does best and the one that does worst."""
    lines = []
    of_size = grouped(
        kernel_cases(document), lambda c: tuple(c[2][n] for n in ("hidden", "intermediate", "tokens"))
    )
    for cases in of_size.values():
        ranked = sorted(cases, key=lambda case: over(case[2], case[0]) or math.inf)
        for dense, naive, ours in ranked if len(ranked) == 1 else (ranked[0], ranked[-1]):
            lines.append((
                f"{ours['hidden']} x {ours['intermediate']}", chain_name(ours), f"{ours['tokens']:,}", _us(dense),
                _us(naive), _us(ours), cell(over(ours, dense), ".2f"), cell(ours["error"], ".0e"),
                cell(ours["predicted_us"], ",.0f") + _missed(ours["median_us"], ours["predicted_us"]),
            ))  # fmt: skip
    what = f"One MLP's place in {document['rows'][0]['dtype']}, microseconds a call on cold weights"
    ours = "look-ahead" if _op(document) == "lookahead-eager" else "as it runs"
    columns = f"MLP | chain | tokens | MLP, us | step by step | {ours} | to MLP | error | forecast"
    return head(document, what, columns, lines)


def model_steps(document: Row) -> list[tuple[Row | None, Row, float | None]]:
    """Original, locked and the ratio of their times for each step of a model, both by one engine: graph, where either
    side was tried by it, else eager. None: was not tried, such as where the step crashed."""
    fields = "model", "lanes", "depth", "rank", "phase", "batch", "tokens", "context"
    compared = []
    for step in grouped(document["rows"], lambda row: tuple(row[n] for n in fields)).values():
        rows = {(row["engine"], row["side"]): row for row in step}
        engine = "graph" if any(engine == "graph" for engine, _ in rows) else "eager"
        theirs, ours = rows.get((engine, "original")), rows.get((engine, "locked"))
        if ours is not None:
            compared.append((theirs, ours, over(ours, theirs)))
    return compared


def models(document: Row) -> list[str]:
    """Of each step of a model both sides by one engine."""
    lines = [
        (
            ours["model"], chain_name(ours), f"{ours['phase']}, {ours['tokens']:,}", _us(theirs), _us(ours),
            cell(ratio, ".2f"), cell(ours["tokens_per_s"], ",.0f"), cell(ours["error"], ".0e"),
        )
        for theirs, ours, ratio in model_steps(document)
    ]  # fmt: skip
    what = f"Whole models of random weights in {document['rows'][0]['dtype']}, microseconds a step"
    columns = "model | chain | step, tokens | original, us | locked, us | ratio | tokens/s | error"
    return head(document, what, columns, lines)


def speed(document: Row) -> list[str]:
    """Of each model, engine, dtype and batch both sides' medians, and how far the locked model's runs lie apart."""
    lines = []
    for ours in (row for row in document["rows"] if row["side"] == "locked"):
        same = ("model", "engine", "dtype", "prompt", "new_tokens", "batch")
        theirs = next(
            (r for r in document["rows"] if r["side"] == "original" and all(r[n] == ours[n] for n in same)),
            {},
        )
        cells = [
            _pair(ours.get(name), theirs.get(name), scale)
            for name, scale in (
                ("first_token_s", 1e3),
                ("prefill_tokens_per_s", 1),
                ("decode_tokens_per_s", 1),
            )
        ]
        memory = [cell(side.get("peak_bytes"), bytes_words) for side in (ours, theirs)]
        lines.append((
            ours["model"], ours["engine"], ours["dtype"], str(ours["batch"]), *cells[:2],
            cell(ours["prefill_ratio"], ".2f"), cells[2], cell(ours["decode_ratio"], ".2f"), " / ".join(memory),
        ))  # fmt: skip
    first = document["rows"][0]
    what = (
        f"Whole models by `dlr-lock bench model`, prompts of {count_words(first['prompt'], 'token')} and "
        f"{first['new_tokens']} new ones; locked / original, and the locked model's speed over the original's"
    )
    columns = (
        "model | engine | dtype | batch | first token, ms | prefill, tokens/s | ratio | decode, tokens/s | ratio | "
        "memory"
    )
    return head(document, what, columns, lines)


def _pair(ours: list[float] | None, theirs: list[float] | None, scale: float) -> str:
    """Both medians, and half of what lies between the 20th and the 80th percentile of ours."""
    if ours is None or theirs is None:
        return "failed"
    low, middle, high = ours
    return f"{scale * middle:,.1f} ± {50 * (high - low) / middle:.0f}% / {scale * theirs[1]:,.1f}"


def training(document: Row) -> list[str]:
    """Of each model the plain step and the fastest one, over an inference pass; where that is red, its error."""
    lines = []
    for (model, side), rows in grouped(document["rows"], lambda row: (row["model"], row["side"])).items():
        timed = {row["strategy"]: row for row in rows if row["step_s"]}
        inference = timed.pop("inference", None)
        best = min(timed.values(), key=lambda row: row["step_s"], default=None)
        if inference is None or best is None:
            tried = next((row for row in rows if row["strategy"] == "inference" and inference is None), None)
            lines.append((model, side, "-" if tried is None else _us(tried | {"median_us": None}), *"---"))
            continue
        cells = []
        for row in (timed.get("plain"), best):
            peak = "" if not row or row["peak_bytes"] is None else f", {row['peak_bytes'] / 1e9:.1f} GB"
            cells.append(f"{row['step_s'] / inference['step_s']:.1f}{peak}" if row else "failed")
        lines.append((model, side, f"{1e3 * inference['step_s']:,.1f}", *cells, best["strategy"]))
    tokens = document["rows"][0]["tokens"]
    what = f"An eager training step of all weights over an eager inference pass, {tokens:,} tokens"
    return head(document, what, "model | side | inference, ms | plain step | best step | best by", lines)


def conversion(document: Row) -> list[str]:
    """A line a point of the curve, and where it would go on to."""
    rows = document["rows"]
    lines = [
        (
            f"{row['train_tokens']:,}", f"{row['end_to_end']:,}", f"{row['seconds']:,.0f}",
            f"{row['flops'] / 1e15:.3g}", cell(row["tflop_per_s"], ".3g"),
            cell(row["matmul_percent"], lambda percent: f"{percent:.1f}%"),
            f"{cell(row['original_loss'], '.3f')} to {cell(row['loss'], '.3f')}",
            cell(row["kl"], ".3f"), cell(row["flips"], ".0%"), cell(row["smallest_gap"], ".2f"),
        )
        for row in rows
    ]  # fmt: skip
    columns = (
        "training tokens of a module | end to end | seconds | PFLOP | TFLOP/s | of a large product's | loss | KL | "
        "flips | smallest gap"
    )
    what = (
        f"All {rows[0]['layers']} layers of {rows[0]['model']} locked at ascending cost, on {rows[0]['text']}"
    )
    if (rates := document.get("measured_rates")) is not None:
        dtype = document["settings"]["dtype"]
        what += f"; one large product in {dtype} reaches {rates['matmul_tflop_per_s']:,.3g} TFLOP/s"
    ends = [
        line
        for name in ("train_tokens", "end_to_end")
        if (
            line := _goes_on([row for row in rows if bool(row["end_to_end"]) == (name == "end_to_end")], name)
        )
    ]
    return head(document, what, columns, lines) + ([" ".join(ends), ""] if ends else [])


def _goes_on(rows: list[Row], name: str) -> str | None:
    """Where the longest fits, or the longest end-to-end phase, of a GPU's efforts would end; None where that was
    measured, and where two points do not tell."""
    rows = (
        [row for row in rows if row["train_tokens"] == rows[-1]["train_tokens"]]
        if name == "end_to_end"
        else rows
    )
    effort = EFFORTS["standard" if name == "train_tokens" else "best"].on(torch.device("cuda"))
    most = getattr(effort, name)
    if len(rows) < 2 or rows[-1][name] >= most or not (rows[-1]["kl"] and rows[-2]["kl"]):
        return None
    before, last = rows[-2:]
    slope = math.log(last["kl"] / before["kl"]) / math.log(last[name] / before[name])
    kl = last["kl"] * (most / last[name]) ** slope
    what = "Fits of" if name == "train_tokens" else "An end-to-end phase of"
    return (
        f"{what} {most:,} training tokens would end at a KL of {kl:.3f} by the last two points: not measured."
    )


def tests(document: Row) -> list[str]:
    """One line."""
    where = "Tests of the kernels" if document["stage"] == "tests" else "Other tests"
    passed, failed, skipped = (sum(r[n] for r in document["rows"]) for n in ("passed", "failed", "skipped"))
    return head(document, f"{where} on the device: {passed} passed, {failed} failed, {skipped} skipped")


def machine(document: Row) -> list[str]:
    """One line; a fact that is far from what the cost model assumes says so."""
    rows = [row for row in document["rows"] if isinstance(row["value"], float)]
    facts = (f"{r['fact']} {r['value']:,.4g} {r['unit']}{_missed(r['value'], r['assumed'])}" for r in rows)
    return head(document, "; ".join(facts))


def _missed(measured: float | None, forecast: float | None) -> str:
    """What a forecast was times, where that is a finding: 30% or more off."""
    if not measured or not forecast or 1 / MISSED < measured / forecast < MISSED:
        return ""
    return f" (**{measured / forecast:.2f}** of {forecast:,.4g})"


def host(document: Row) -> list[str]:
    """A line a kind of call."""
    lines = [
        (row["what"], f"{row['launches']}", f"{row['calls']:,}", cell(row["us"] / row["launches"], ".1f"))
        for row in document["rows"]
    ]
    note = f" ({document['note']})" if document.get("note") else ""
    what = f"What launching costs the host, by a driver that launches nothing{note}"
    return head(document, what, "call | launches | functions called | us a launch", lines)


def products(document: Row) -> list[str]:
    """A line a fit."""
    lines = [
        (
            str(row["layer"]), row["chain"], f"{row['train_tokens']:,}", row["products"], f"{row['rel_error']:.4f}",
            f"{row['error_ratio']:.4f}", f"{row['flatten_gap']:.2f}", f"{row['seconds']:,.0f}",
            f"{row['flops'] / 1e12:.3g}",
        )
        for row in document["rows"]
    ]  # fmt: skip
    what = f"Fits of chains with products in two dtypes, on {document['rows'][0]['tokens']:,} tokens of text"
    columns = (
        "layer | chain | training tokens | products | error | to that of float32 | gap | seconds | TFLOP"
    )
    return head(document, what, columns, lines)


TABLES: dict[str, Callable[[Row], list[str]]] = {
    "machine": machine,
    "tests": tests,
    "kernels": kernels,
    "models": models,
    "speed": speed,
    "training": training,
    "conversion": conversion,
    "moretests": tests,
    "host": host,
    "fidelity-products": products,
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
            times = (f"{a:,.0f} / {b:,.0f}" for a, b in zip(ours, mlp, strict=True))
            lines.append((shape.replace("x", " x "), chain_name(spec.to_dict()), *times))
    return table(Table(("MLP", "chain", *(count_words(count, "token") for count in TOKENS)), lines))


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
