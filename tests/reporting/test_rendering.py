"""Sections on a terminal, as HTML and as Markdown: all is there, in one piece, and nothing is markup but ours."""

import ast
import importlib
import io
import re
import xml.etree.ElementTree as ET
from itertools import cycle, islice, pairwise
from pathlib import Path

import pytest
from rich.console import Console

from dlr_lock import reporting
from dlr_lock.reporting import Curve, Plot, Section, Table, headings, print_sections, svg
from dlr_lock.reporting.html import document
from dlr_lock.reporting.legend import TERMS, legend
from dlr_lock.reporting.markdown import markdown
from dlr_lock.reporting.words import (
    bytes_words,
    cell,
    chain_name,
    count_words,
    flops_words,
    rate_words,
    ratio_words,
    seconds_words,
)

HOSTILE = "<b>[bold]a | b[/bold]</b>"
NAME = "model.decoder.layers.{}.feed_forward"
COLUMNS = headings("module | chain | flatten gap | first tokens | coupling | verdict | seconds | note")


def modules(layers: int = 3) -> Section:
    rows = [
        (
            NAME.format(n), "1x12x192 silu", f"0.{n}", "0.1234", "0.97", "UNDONE, 0.99 at 0.25x",
            "1,234.5", "a remark of several words",
        )
        for n in range(layers)
    ]  # fmt: skip
    return Section("Modules", "What was locked.", Table(COLUMNS, rows, minor=("first tokens",)), [HOSTILE])


def printed(*sections: Section, width: int = 80) -> str:
    out = io.StringIO()
    print_sections(Console(file=out, width=width, force_terminal=False), sections)
    return out.getvalue()


@pytest.mark.parametrize("width", [50, 60, 80, 100, 200])
def test_a_terminal_shows_every_row_within_its_width_and_cuts_no_name(width: int) -> None:
    text = printed(modules(), width=width)
    assert all(len(line) <= min(100, width) for line in text.splitlines())
    for n in range(3):
        assert NAME.format(n) in text
    for piece in ("1x12x192 silu", "UNDONE, ", "1,234.5", "remark"):
        assert piece in text
    assert ("0.1234" in text) == ("first tokens:" in text)  # a column that gives way is not explained either
    assert HOSTILE in text  # no markup, and in one piece


def test_where_columns_do_not_fit_the_first_one_is_repeated() -> None:
    assert printed(modules(), width=60).count(NAME.format(1)) > 1
    assert (
        printed(Section("", table=Table(headings("a | b"), [("x" * 30, "y" * 30)])), width=80).count("x" * 30)
        == 1
    )


def test_a_section_without_rows_is_passed_over_on_a_terminal_and_said_in_a_document() -> None:
    nothing = Section("Attacks", "What they do.", Table(("attack",), [], empty="Not run."))
    assert printed(nothing) == ""
    assert "Not run." in document(Section("Title"), [nothing])


def test_columns_that_no_row_fills_can_be_left_out() -> None:
    table = Table(headings("a | b | c"), [("x", "-", ""), ("y", "", "1")]).filled()
    assert table.columns == ("a", "c") and list(table.rows) == [("x", ""), ("y", "1")]


def test_a_term_is_explained_once_and_only_where_it_is_used() -> None:
    folded = Section("More", details=[Table(headings("held | KL"), [("1", "2")])], terms=["strategy"])
    notes = legend([modules(), modules(), folded]).notes
    assert len(notes) == len({note.split(":")[0] for note in notes})
    assert {"chain", "flatten gap", "held", "KL", "strategy"} <= {note.split(":")[0] for note in notes}
    assert not any(note.startswith("held") for note in legend([folded], details=False).notes)
    for text in (printed(modules(), modules()), markdown([modules(), modules()])):
        assert " ".join(text.split()).count("1x12x192 is one chain of 12 steps of rank 192") == 1
    assert "Terms" not in printed(Section("A", "text"))
    assert all(words == words.strip() and not words.endswith(".") for words in TERMS.values())


def test_a_document_is_well_formed_and_takes_no_markup_from_data() -> None:
    plots = [Plot(f"{HOSTILE} {n}", "tokens", HOSTILE, [Curve([1, 2], [3, 4], HOSTILE)]) for n in range(2)]
    hostile = Section(HOSTILE, HOSTILE, Table((HOSTILE,), [(HOSTILE,)], HOSTILE), [HOSTILE], plots, HOSTILE)
    page = document(Section(HOSTILE, HOSTILE), [hostile, modules()])
    body = page.removeprefix("<!DOCTYPE html>").replace('<meta charset="utf-8">', "")
    body = body.replace('<meta name="viewport" content="width=device-width, initial-scale=1">', "")
    for kind in "nk":
        body = body.replace(f" class={kind}>", f' class="{kind}">')
    root = ET.fromstring(body.replace("class=quiet", 'class="quiet"'))
    assert "<b>" not in page and not any(element.tag == "b" for element in root.iter())
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    links = {(element.get("href") or "#")[1:] for element in root.iter("a")}
    assert links and links <= set(ids)


def test_terms_stand_under_the_table_that_is_the_first_to_use_them() -> None:
    later = Section("Later", table=Table(headings("what | KL | flatten gap"), [("a", "1", "2")]))
    text = " ".join(printed(modules(), later).split())
    assert text.index("- flatten gap:") < text.index("Later") < text.index("- KL:")
    assert text.count("- flatten gap:") == 1


def test_a_name_wider_than_a_screen_is_broken_at_its_dots() -> None:
    name = "model.language_model.decoder_stack.layers.11.shared_block.feed_forward_network.mlp_of_the_block"
    text = printed(Section("", table=Table(headings("module | flips"), [(name, "1.5%")])))
    first, *_ = [line.split()[0] for line in text.splitlines() if line.startswith("model.")]
    assert first.endswith(".") and all(len(line) <= 80 for line in text.splitlines())
    assert all(part in text for part in name.split("."))


def test_curves_have_a_key_and_no_two_strokes_are_alike() -> None:
    pytest.importorskip("matplotlib")
    svg = importlib.import_module("dlr_lock.reporting.svg")
    strokes = [f"attack {n}" for n in range(9)]
    curves = [Curve([1, 10], [n, 2], "locked", name, ([n, 1], [n, 3])) for n, name in enumerate(strokes)]
    drawn = svg.drawn([Plot("a plot", "tokens", "gain", curves, [1.5])])
    assert all(f">{name}<" in drawn for name in (*strokes, "locked", "tokens", "gain"))
    assert len(set(islice(zip(cycle(svg._LINES), cycle(svg._MARKS), strict=False), 28))) == 28


def test_markdown_escapes_what_would_be_a_column() -> None:
    lines = markdown(
        [Section("T", "text", Table(headings("what | KL"), [(HOSTILE, "1.0")]), ["note"])]
    ).splitlines()
    assert lines[:5] == ["## T", "", "text", "", "| what | KL |"]
    assert lines[5:7] == ["|---|---:|", f"| {HOSTILE.replace('|', chr(92) + '|')} | 1.0 |"]
    assert "- note" in lines and any(line.startswith("- KL: ") for line in lines)


@pytest.mark.parametrize(
    ("worded", "words"),
    [
        (flops_words(2.73e15), "2.73 PFLOP"), (flops_words(999), "999 FLOP"), (flops_words(2e21), "2e+03 EFLOP"),
        (seconds_words(12.34), "12.3 s"), (seconds_words(5616), "93.6 min"), (seconds_words(7200), "2 h"),
        (bytes_words(1000), "1000 bytes"), (bytes_words(610_000_000), "581.7 MiB"), (bytes_words(2**41), "2,048 GiB"),
        (rate_words(3.2e-4), "3.2e-4"), (rate_words(1e-6), "1e-6"), (ratio_words(1.2345), "1.23"),
        (ratio_words(None), "-"), (ratio_words(2, True), "more than 2"), (cell(None, ".3f"), "-"),
        (cell(0.5, ".0%"), "50%"), (cell(2, seconds_words), "2 s"), (count_words(1, "token"), "1 token"),
        (count_words(4096, "token"), "4,096 tokens"), (chain_name({"lanes": 1, "depth": 12, "rank": 192}), "1x12x192"),
    ],
)  # fmt: skip
def test_numbers_in_words(worded: str, words: str) -> None:
    assert worded == words


def test_reporting_imports_nothing_of_ours_but_common() -> None:
    for path in Path(reporting.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                name = node.module or ""
                assert not name.startswith("dlr_lock") and (
                    node.level < 2 or name.split(".")[0] == "common"
                ), path


def test_labels_of_a_logarithmic_axis_do_not_overlap() -> None:
    """Six close counts of training tokens, as an audit of several shares has them, and 25 modules' worth of errors."""
    pytest.importorskip("matplotlib")
    x = [6_400.0, 6_656.0, 25_600.0, 25_700.0, 102_400.0, 409_600.0]
    for y in ([0.9, 1.0, 1.1, 1.2, 1.5, 1.9], [0.5, 3.0, 20.0, 90.0, 200.0, 800.0]):
        curve = Curve(x, y, "linear")
        drawing = svg.drawn([Plot("errors", "training tokens", "ratio", [curve], [1], log=True)])
        places = re.findall(r'<text[^>]*?x="([\d.]+)" y="([\d.]+)"[^>]*>([\d.]+k?)</text>', drawing)
        columns = sorted(float(at) for at, _, label in places if label.endswith("k"))
        rows = sorted({float(at) for _, at, label in places if not label.endswith("k")})
        assert len(columns) >= 3 and all(b - a > 25 for a, b in pairwise(columns)), places
        assert len(rows) >= 2 and all(b - a > 9 for a, b in pairwise(rows)), places
