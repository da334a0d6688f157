"""The price in an owner's words: constructed rows whose answers are known by hand."""

import io
import math
import re
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from audit_rows import run, step
from rich.console import Console

from dlr_lock.audit.asymmetry import DepthCost, depth_costs
from dlr_lock.audit.price import ATTACKERS, CAREFUL, EXPERT, OWNER, STANDARD, cheapest, owners_price
from dlr_lock.audit.report import AttackerCost, AuditReport, OwnersPrice, Run, StepCost, Structural
from dlr_lock.audit.sections import audit_sections, page
from dlr_lock.convert import Evaluation
from dlr_lock.reporting import print_sections
from dlr_lock.runtime import DLRSpec

STEPS = [
    step("original", "full", "plain", 30, 1000, 0.3),
    step("original", "full", "checkpoint", 40, 400),
    step("original", "LoRA", "LoRA, plain", 20, 900, 0.2),
    step("locked", "full", "plain", 30, 4000, 0.9),
    step("locked", "full", "inversion", 35, 900, 0.6),
    step("locked", "full", "checkpoint", 40, 500, 1.2),
    step("re-distilled, 0.25", "full", "plain", 30, 1000, 0.3),
    step("re-distilled, 1", "full", "plain", 30, 1000, 0.3),
]
EVALUATION = Evaluation(3.0, 20.0, 100, 3.0, 20.0, 0.1, 0.1, 0.1)
# The best gain is 3, nine tenths of it a loss of 3.3: the original is there after 170 tokens, the locked model after
# 270, a poor copy after 210 and a good one after 180.
RUNS = {
    "original": run("original", "full", [6.0, 4.0, 3.0]),
    "adapters": run("original", "LoRA", [6.0, 5.5, 5.2]),
    "locked": run("locked", "full", [7.0, 5.0, 4.0, 3.0]),
    "poor": run("re-distilled, 0.25", "full", [6.5, 4.5, 3.4, 2.4]),
    "good": run("re-distilled, 1", "full", [6.5, 4.5, 3.0]),
}


def report(runs: dict[str, Run] = RUNS, steps: list[StepCost] = STEPS) -> AuditReport:
    structural = [
        Structural("flatten", "every step reads x", EVALUATION, "MLP"),
        Structural("re-distilled, 0.25", "distilled", EVALUATION, "MLP", 100, 2_000, 20.0),
        Structural("re-distilled, 1", "distilled", EVALUATION, "MLP", 400, 8_000, 80.0),
    ]
    made = AuditReport(
        "locked", "original", {}, {"device": "NVIDIA H100"}, "", EVALUATION, structural, [], list(runs.values()), steps,
        [], [],
    )  # fmt: skip
    return replace(made, price=owners_price(made))


def price(**changed: Run | None) -> OwnersPrice:
    found = report({k: v for k, v in (RUNS | changed).items() if v is not None}).price
    assert found is not None
    return found


def ways(price: OwnersPrice, measure: str = "flops") -> dict[str, list[AttackerCost]]:
    return {who: [a for a in price.attackers if (a.who, a.measure) == (who, measure)] for who in ATTACKERS}


def test_each_attacker_by_hand() -> None:
    found = ways(price())
    assert [(a.attack, a.strategy, a.each) for a in found[OWNER]] == [("original, full", "plain", 17 * 30)]
    assert [(a.strategy, a.each, a.peak) for a in found[STANDARD]] == [
        ("plain", pytest.approx(27 * 30), 4000)
    ]
    # in the memory of the original's plain step, 1000, by the cheaper of two
    assert [(a.strategy, a.each) for a in found[CAREFUL]] == [("inversion", pytest.approx(27 * 35))]
    poor, good = found[EXPERT]
    assert (poor.first, poor.each) == (2_000, pytest.approx(21 * 30))
    assert (good.first, good.each) == (8_000, pytest.approx(18 * 30))
    assert cheapest(found[EXPERT], 10) is poor and cheapest(found[EXPERT], 100) is good
    seconds = ways(price(), "seconds")
    assert seconds[CAREFUL][0].each == pytest.approx(27 * 0.6) and seconds[EXPERT][1].first == 80
    assert price().ratio == pytest.approx(810 / 510) and not price().bound


def test_it_breaks_even_with_the_first_fine_tune_that_is_no_dearer() -> None:
    """The poor copy saves 180 of 810 a fine-tune and cost 2,000; the good one saves 270 and cost 8,000."""
    n = price().break_even["flops"]
    assert n == math.ceil(2_000 / 180) == 12
    poor = ways(price())[EXPERT][0]
    assert poor.total(12) <= 12 * 810 and poor.total(11) > 11 * 810
    # in seconds training through the chains takes 16.2 by inversion, and the copy 6.3
    assert price().break_even["seconds"] == math.ceil(20 / (27 * 0.6 - 21 * 0.3)) == 3


def test_the_words() -> None:
    tune, undo = price().words
    assert tune.startswith("A fine-tune of 170 tokens, to 90% of the original's best gain, costs 1.59 times")
    assert "(810 FLOP against 510 FLOP)" in tune and "('locked, full')" in tune
    assert "in seconds, 3.18 times" in tune
    assert "('re-distilled, 0.25') pays 2 kFLOP, 20 s on one NVIDIA H100, once" in undo
    assert "3.92 fine-tunes of the original; then 1.24 times" in undo
    assert undo.endswith("From 12 fine-tunes on, undoing first is the cheapest, in seconds from 3 on.")


def test_undoing_that_is_cheap_comes_before_a_single_fine_tune() -> None:
    made = report()
    free = [replace(row, flops=row.flops and 1) for row in made.structural]
    found = owners_price(replace(made, structural=free))
    assert found and found.break_even["flops"] == 1 and found.ratio == pytest.approx((1 + 540) / 510)
    assert "undoing the lock included" in found.words[0]
    assert "for a single fine-tune already" in found.words[1]


def test_undoing_that_never_pays() -> None:
    found = price(locked=run("locked", "full", [7.0, 3.0]))
    assert found.break_even["flops"] is None and found.words[1].endswith("no dearer.")


def test_what_is_a_lower_bound_says_so() -> None:
    lost = {
        "locked": run("locked", "full", [7.0, 6.0]),
        "poor": run("re-distilled, 0.25", "full", [7.0, 6.0]),
        "good": run("re-distilled, 1", "full", [7.0, 6.0]),
    }
    found = price(**lost)
    assert found.bound and "costs more than 0.588 times" in found.words[0] and "lower bound" in found.words[0]
    assert found.break_even["flops"] is None and "lower bound" in found.words[1]
    assert all(a.bound for who, some in ways(found).items() for a in some if who != OWNER)
    one = price(locked=lost["locked"])  # nobody got there through the chains, the expert did
    assert not one.bound and "re-distilled" in one.words[0] and one.break_even["flops"] == 1
    assert one.words[1].endswith("Nothing else reached the gain within the budget.")
    rows = [row for row in page(report(RUNS | lost)).split("<tr>") if ">1,000<" in row]
    assert rows and all(row.count("more than") == 3 for row in rows)


def test_without_a_gain_there_is_no_price() -> None:
    assert report({"original": run("original", "full", [6.0, 6.1]), "locked": RUNS["locked"]}).price is None
    assert report({}).price is None
    assert report(steps=[]).price is None
    assert "Not known: no fine-tune of the original" in page(report({}))


def test_what_was_not_distilled_back_is_said() -> None:
    found = price(poor=None, good=None)
    assert "not known: no chain was distilled back" in found.words[1] and not ways(found)[EXPERT]


def test_it_is_where_a_report_begins() -> None:
    made = report()
    head, price_section, *_ = audit_sections(made)
    assert made.price and head.text.startswith("\n".join(made.price.words))
    assert list(made.to_dict())[:2] == ["schema", "price"]
    assert made.to_dict()["price"]["words"] == made.price.words
    assert price_section.table and len(price_section.table.rows) == 14
    rows = {row[:2]: row[2:] for row in map(tuple, price_section.table.rows)}
    assert rows["FLOPs", "1"] == ("810 FLOP (1.59)", "945 FLOP (1.85)", "2.63 kFLOP (5.16)", "510 FLOP (1)")
    assert rows["FLOPs", "100"][2] == "62 kFLOP (1.22)"  # 8,000 + 100 x 540: the good copy
    out = io.StringIO()
    print_sections(Console(file=out, width=80, force_terminal=False), audit_sections(made))
    assert made.price.words[0].split(",")[0] in out.getvalue()
    assert all(len(line) <= 80 for line in out.getvalue().splitlines())


def test_the_picture_has_every_attacker_and_labels_apart() -> None:
    pytest.importorskip("matplotlib")
    document = page(report())
    drawing = document[document.index("<svg") : document.index("</svg>")]
    for who in ATTACKERS:
        assert f">{who}<" in drawing
    labels = [
        (float(x), float(y), words)
        for x, y, words in re.findall(r'<text[^>]*?x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)</text>', drawing)
    ]
    assert {"1", "3", "10", "30", "100", "300", "1k"} <= {words for *_, words in labels}
    for (x, y, one), (u, v, other) in combinations(labels, 2):
        assert abs(y - v) > 9 or abs(x - u) > 4 * (len(one) + len(other)) / 2, (one, other)


def test_depth_keeps_more_and_its_backward_passes_wait_longer() -> None:
    """A chain of K steps keeps K states of d, and 2 K r of what its steps read and write; the MLP its x and 4 f."""
    spec = DLRSpec.matching(64, 512, mlp_gated=True)
    rows = list(depth_costs(spec, 512, tokens=32))
    assert all(isinstance(row, DepthCost) for row in rows)
    assert [row.depth for row in rows] == sorted({row.depth for row in rows}) and len(rows) >= 3
    assert all(b.saved > a.saved for a, b in pairwise(rows))
    assert len({row.original_saved for row in rows}) == 1
    for row in rows:
        states = 32 * 4 * row.depth * spec.hidden_size
        assert states < row.saved < 1.5 * states + 32 * 4 * 4 * 3 * 512
        assert row.original_backward["flops"] == 2
    made = replace(report(), depths=rows)
    assert f">{rows[-1].chain}<" in page(made)
