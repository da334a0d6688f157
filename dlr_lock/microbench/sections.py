"""The micro-benchmark and the cost model's explanation as sections."""

from typing import Any

from ..reporting import Section, Table, grouped, headings
from ..reporting.words import cell, chain_name, count_words

_PATHS = ("dense", "decode", "prefill")
_PLAN = ("rounds", "launches", "m", "S", "ctas", "num_warps")


def benchmark_sections(document: dict[str, Any]) -> list[Section]:
    """The rows of a benchmark, a table a case; columns that no row fills are left out."""
    rates = document["measured_rates"]
    measured = (
        f"{document['device']}, {document['settings']['dtype']}; copies at {rates['copy_gb_per_s']:,.0f} GB/s, "
        f"products at {rates['matmul_tflop_per_s']:,.2f} TFLOP/s."
    )
    sections = [Section("", measured, terms=["chain"])]
    for case, rows in grouped(document["rows"], _case).items():
        cells = [_cells(row) for row in rows]
        table = Table(tuple(cells[0]), [tuple(c.values()) for c in cells]).filled()
        red = [f"{row['provider']}: {_fault(row)}" for row in rows if not row["accurate"]]
        sections.append(Section(case, table=table, notes=red))
    return [*sections, *([Section("", f"stopped {document['stopped']}")] if document["stopped"] else [])]


def _fault(row: dict[str, Any]) -> str:
    return row["error_message"] or f"error {row['error']:.1e} over {row['error_limit']:.1e}"


def _case(row: dict[str, Any]) -> str:
    return (
        f"{count_words(row['tokens'], 'token')}; MLP {row['hidden']} x {row['intermediate']}, chain "
        f"{chain_name(row)} of {row['params_ratio']:.3f} its parameters"
    )


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """Heading to text."""
    median = row["median_us"]
    return {
        "provider": row["provider"],
        "error": cell(row["error"], ".1e"),
        "us": cell(median, ",.1f"),
        "p20 to p80": "-" if median is None else f"{100 * (row['p80_us'] - row['p20_us']) / median:.0f}%",
        "to dense": cell(row["ratio_to_dense"], ".2f"),
        "copy rate": cell(row["copy_percent"], "{:.0f}%".format),
        "product rate": cell(row["matmul_percent"], "{:.0f}%".format),
        "launches": cell(row["launches"], "d"),
        "forecast us": cell(row["predicted_us"], ",.1f"),
    }


def explanation_sections(facts: dict[str, Any]) -> list[Section]:
    """Floor, forecasts and choice for each token count, with the constants that they rest on."""
    device, chain, gram = facts["device"], facts["chain"], facts["gram"]
    assumed = (
        f"There is no GPU here: the constants are those of an {device['name']}.\n" if facts["assumed"] else ""
    )
    shape = (
        f"The chain {chain_name(chain)} {chain['act']} on {chain['hidden_size']} features, {facts['dtype']}: Gram "
        f"blocks of m = {gram['m']} ({gram['S']} steps), {gram['bytes'] / 1e6:.1f} MB."
    )
    rows = []
    for row in facts["rows"]:
        for path in _PATHS:
            f = row[path] or {}
            times = (cell(f.get(name), ".1f") for name in ("predicted_us", "floor_us"))
            rest = (cell(f.get(name)) for name in _PLAN)
            rows.append((str(row["tokens"]), path, "yes" if path == row["choice"] else "", *times, *rest))
    columns = headings("tokens | path | choice | us | floor us | rounds | launches | m | S | CTAs | warps")
    constants = (
        f"{device['name']}: {device['sms']} multiprocessors; memory {device['bandwidth'] / 1e9:,.0f} GB/s, products "
        f"{device['flops'] / 1e12:,.0f} TFLOP/s, L2 to a multiprocessor {device['sm_bandwidth'] / 1e9:.0f} GB/s, "
        f"additions in L2 {device['atomics'] / 1e9:,.0f} GB/s; launch {1e6 * device['launch']:.2f} us, barrier "
        f"{1e6 * device['barrier']:.2f} us, step {1e6 * device['step']:.2f} us; persistent grids: "
        f"{'yes' if device['cooperative'] else 'no'}."
    )
    return [Section("", assumed + shape, Table(columns, rows), terms=["chain"]), Section("", constants)]
