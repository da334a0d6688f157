"""A conversion in words: the terminal, the model card and `inspect` say the same of the same figures."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dlr_lock.audit.demo import DemoResult, ModelCost, SlotTraining, demo_sections
from dlr_lock.audit.meters import StepCounts, StepSeconds
from dlr_lock.audit.strategies.slot import StrategyCost
from dlr_lock.convert.config import ConversionConfig
from dlr_lock.convert.evaluate import Evaluation, Fidelity, StateEvaluation
from dlr_lock.convert.report import (
    ConversionReport,
    EndToEndReport,
    ModuleReport,
    choices,
    conversion_sections,
    evaluation_section,
    evaluation_words,
    facts_sections,
    model_card,
)
from dlr_lock.reporting import Section, print_sections
from dlr_lock.reporting.lock_verdict import LockVerdict, Redistillation, lock_status
from dlr_lock.runtime import DLRSpec
from dlr_lock.triton_kernels.meter import Counts

BEFORE = Evaluation(3.52, 33.78, 8176, 3.1, 22.2, 0.42, 0.462, 0.21)


def printed(sections: list[Section], width: int = 80) -> str:
    out = io.StringIO()
    print_sections(Console(file=out, width=width, force_terminal=False), sections)
    return out.getvalue()


@pytest.fixture
def report() -> ConversionReport:
    spec = DLRSpec(576, 1, 12, 192)
    attack = Redistillation(102_400, 409_600, 0.1984, 0.2, 0.04)
    modules = [
        ModuleReport(
            f"model.layers.{n}.mlp",
            n,
            spec,
            spec.params,
            Fidelity(0.2, gap, 0.97, 0.31),
            409_600,
            241.7,
            0.034,
            attack,
        )
        for n, gap in ((11, 0.93), (12, 0.41))
    ]
    end = EndToEndReport(
        65_536, 9.0, BEFORE, BEFORE, 0.8, 0.9, modules[0].module, attack, replace(attack, error=0.3)
    )
    return ConversionReport(
        source="owner/Model-1B", out="out", options=ConversionConfig().resolved().to_dict(), modules=modules, mlps=30,
        params_original=135_000_000, params_locked=135_000_100, evaluation=replace(BEFORE, kl=0.3), seconds=493.2,
        across="sequential", end_to_end=end, warnings=["the text repeats itself"], program={"dlr-lock": "0.1.0"},
    )  # fmt: skip


def test_terminal_card_and_inspect_show_the_same_figures(report: ConversionReport) -> None:
    text, card = printed(conversion_sections(report)), model_card(report)
    facts = {
        "program": "dlr-lock 0.1.0", "files": {"a": 1}, "conversion": report.to_dict() | {"fingerprint": "0" * 64},
        "lock": {"modules": {m.module: m.spec.to_dict() for m in report.modules}},
    }  # fmt: skip
    for shown in (text, card, printed(facts_sections(facts))):
        for piece in (
            "model.layers.11.mlp",
            "1x12x192 silu",
            "0.2000",
            "0.93",
            "UNDONE,",
            "NOT LOCKED, FLAT: model.layers.12.mlp",
        ):
            assert piece in shown
    for shown in (" ".join(text.split()), card):
        assert (
            lock_status({m.module: m.judgement for m in report.modules}) in shown
            and "the text repeats itself." in shown
        )
        assert evaluation_words(BEFORE) in shown and "'not undone, 1.50 at 0.25x' now" in shown
        assert "2 of 30 MLPs were converted in 493 s" in shown and "0.3000" in shown
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "parameters instead of" not in card


def test_the_layers_are_drawn_in_terminal_and_card(report: ConversionReport) -> None:
    """The longest bar is of the largest figure, half as long an error has half the bar; nothing else is as long."""
    small = replace(report.modules[1], fidelity=Fidelity(0.1, 0.41, 0.97, 0.31))
    sections = conversion_sections(replace(report, modules=[report.modules[0], small]))
    (section,) = [s for s in sections if s.title == "Over the layers"]
    assert section.table is not None
    drawn = [(row[1], row[3]) for row in section.table.rows]
    assert drawn[0] == (16 * "█", 16 * "█") and drawn[1][0] == 8 * "█" and 1 < len(drawn[1][1]) < 16
    card = model_card(replace(report, modules=[report.modules[0], small]))
    for bar in (piece for row in drawn for piece in row):
        assert bar in printed(sections) and bar in card
    assert "|---|---|---:|---|---:|" in card  # bars grow to the right
    assert "Over the layers" not in printed(conversion_sections(replace(report, modules=[small])))


def test_bars_on_a_terminal_without_blocks_are_of_number_signs(report: ConversionReport) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_sections(Console(file=out, width=80), conversion_sections(report))
    out.seek(0)
    assert 16 * "#" in out.read()


@pytest.mark.parametrize(("kl", "warned"), [(0.49, False), (0.51, True), (None, False)])
def test_a_ruined_model_is_called_that_wherever_it_is_read(
    report: ConversionReport, kl: float | None, warned: bool
) -> None:
    evaluation = StateEvaluation(0.9, 0.1, 4096) if kl is None else replace(BEFORE, kl=kl)
    report = replace(report, evaluation=evaluation)
    facts = {
        "program": "dlr-lock 0.1.0", "files": {}, "conversion": report.to_dict() | {"fingerprint": "0" * 64},
        "lock": {"modules": {m.module: m.spec.to_dict() for m in report.modules}},
    }  # fmt: skip
    for shown in (
        model_card(report),
        printed(facts_sections(facts)),
        str(report.to_dict()["not_the_original"]),
    ):
        assert ("this model is not the original any more" in " ".join(shown.split())) == warned
    card = model_card(report).splitlines()
    assert card[card.index("# Model-1B, locked") + 2].startswith("> **Warning:**") == warned


@pytest.mark.parametrize(
    ("error", "gap", "student", "merged", "verdict", "cell", "undoing"),
    [
        (0.2, 0.93, 0.3, 0.4, LockVerdict.HELD, "locked, 1.50 at 0.25x", ("more than 0.25", "-")),
        (0.2, 0.93, 0.209, 0.4, LockVerdict.UNDONE, "UNDONE, 1.04 at 0.25x", ("at most 0.25", "at most 1")),
        (0.2, 0.93, 0.22, 0.209, LockVerdict.UNDONE, "UNDONE, 1.04 untrained", ("0", "0")),
        (0.2, 0.49, 0.3, None, LockVerdict.FLAT, "FLAT, 1.50 at 0.25x", ("more than 0.25", "-")),
        (0.95, 0.1, 0.96, None, LockVerdict.EMPTY, "EMPTY, 1.01 at 0.25x", ("at most 0.25", "at most 1")),
        (0.2, 0.93, None, None, LockVerdict.UNTRIED, "not attacked", None),
    ],
)
def test_a_module_has_one_verdict_wherever_it_is_read(
    report: ConversionReport,
    error: float,
    gap: float,
    student: float | None,
    merged: float | None,
    verdict: LockVerdict,
    cell: str,
    undoing: tuple[str, str] | None,
) -> None:
    """In the status, the table, the card, `inspect`, JSON: from the figure that decides, and no other beside it. The
    two figures of what undoing takes agree with it."""
    attack = None
    if student:
        errors = {"flat": student, "random": 2.0}
        attack = Redistillation(102_400, 409_600, student, error, 0.04, "flat", errors, merged)
    m = replace(report.modules[0], fidelity=Fidelity(error, gap, 0.97, 0.31), redistillation=attack)
    report = replace(report, modules=[m], end_to_end=None)
    assert m.verdict == verdict and m.to_dict()["verdict"] == verdict.value
    assert report.to_dict()["not_locked"] == ([m.module] if cell[:2].isupper() else [])
    facts = {"program": "", "files": {}, "conversion": report.to_dict() | {"fingerprint": ""},
             "lock": {"modules": {m.module: m.spec.to_dict()}}, "mlps": 30, "source": ""}  # fmt: skip
    for text in (printed(conversion_sections(report)), model_card(report), printed(facts_sections(facts))):
        shown, terms = " ".join(text.split()).split("whether a chain is a lock, by the figure that decides")
        assert all(piece in shown for piece in cell.split())  # a narrow column has them below one another
        assert lock_status({m.module: m.judgement}) in shown and "UNDONE, for" in terms
        assert ("locked," in shown) == (verdict is LockVerdict.HELD)
        assert ("undoing / conversion: training tokens" in terms) == bool(undoing)
        assert ("NOT LOCKED" in shown) == verdict.refuted
        assert ("nearly for free" in shown) == (verdict is LockVerdict.FLAT)
        assert ("withstood" in shown) == (verdict is LockVerdict.HELD)
        assert ("not attacked: whether" in shown) == (verdict is LockVerdict.UNTRIED)
    if undoing:
        cells = " | ".join((cell, *(words for words in undoing if words != "-")))
        assert f"| {cells} |" in model_card(report)
        found = m.to_dict()["redistillation"]
        assert found["undone"] == (found["undoing_over_conversion"]["most"] is not None)


def test_a_checkpoint_without_a_manifest_shows_its_chains(report: ConversionReport) -> None:
    text = printed(facts_sections({"lock": {"modules": {"mlp": report.modules[0].spec.to_dict()}}}))
    assert "1x12x192 silu" in text and "no manifest" in text and "flatten gap" not in text


def test_an_evaluation_says_what_it_knows() -> None:
    alone = Evaluation(3.52, 33.78, 8176)
    assert "3.5200" in evaluation_words(alone) and "original" not in evaluation_words(alone)
    assert "difference" not in printed([evaluation_section(alone)])
    states = StateEvaluation(0.061, 0.9712, 4096)
    for words in (evaluation_words(states), printed([evaluation_section(states)])):
        assert "0.0610" in words and "0.9712" in words and "4,096 tokens" in words


def test_the_choices_of_a_conversion_are_one_sentence() -> None:
    words = choices(ConversionConfig(end_to_end=1024, layers="3-5").resolved())
    assert (
        words.startswith("Effort standard:")
        and "1,024 of all chains at once" in words
        and "layers 3-5" in words
    )


def test_a_report_of_a_module_survives_json(report: ConversionReport) -> None:
    attack = replace(
        report.modules[0].redistillation, errors={"linear": 0.3, "flat": 0.1984}, merged_error=0.21
    )
    for changes in ({}, {"redistillation": None, "drift": None}, {"redistillation": attack}):
        module = replace(report.modules[0], **changes)
        assert ModuleReport.from_dict(json.loads(json.dumps(module.to_dict()))) == module


def test_an_older_manifest_s_attack_is_judged_by_what_it_says(report: ConversionReport) -> None:
    old = report.modules[0].to_dict()
    new = ("errors", "merged_error", "undoing_over_conversion", "undoing_over_fresh")
    old["redistillation"] = {k: v for k, v in old["redistillation"].items() if k not in new}
    facts = {"program": "", "files": {}, "conversion": report.to_dict() | {"fingerprint": "", "modules": [old]},
             "lock": {"modules": {old["module"]: old["spec"]}}}  # fmt: skip
    shown = " ".join(printed(facts_sections(facts), 100).split())
    assert "NOT LOCKED, UNDONE: model.layers.11.mlp (an MLP" in shown and "at most 0.25" in shown


def cost(strategy: str, held: int, seconds: float) -> StrategyCost:
    nothing = Counts(0, 0, 0)
    counts = StepCounts(nothing, nothing, held, held, held)
    return StrategyCost(strategy, "weights", held, counts, StepSeconds(seconds, 0.0, 0.0))


def test_the_demo_says_what_training_costs_and_what_both_models_write(report: ConversionReport) -> None:
    locked, original = ModelCost(512, 0.3, 2.0, 900_000_000), ModelCost(512, 0.1, 0.5, 300_000_000)
    slot = SlotTraining(
        cost("plain", 65_500_000, 0.4), cost("inversion", 2_500_000, 0.3), cost("plain", 5_000_000, 0.2)
    )
    result = DemoResult(
        report, locked, original, slot, "Snow [is]", "white", "cold", Path("small.gguf"), None
    )
    text = " ".join(printed(demo_sections(result), width=100).split())
    for words in (
        "training step of all weights, seconds",
        "4.00",
        "900.0",
        "Snow [is]",
        "locked: white",
        "original: cold",
        "with 2 of its 30 MLPs locked its loss on text it has not seen is 3.520, where the",
        "is 3.100 (+13.5%)",
        "an inference pass takes 3.00 times as long",
        "by standard tooling keeps 13 times the activations, for 2 times the seconds",
        "the best strategy that we know (inversion) 0.5 times the activations, for 1.5 times the seconds",
        "for 0.25 of the training tokens that the chain took, came to 0.99 times the chain's error",
        "does not stop whoever has the original's weights",
        "dlr-lock layers path-or-hub-id --data text.txt --layers auto:6",
        "dlr-lock convert path-or-hub-id out --data text.txt --layers 12-17",
        "dlr-lock audit out --original path-or-hub-id",
    ):
        assert words in text
    kept = printed(demo_sections(replace(result, kept=Path("here"))))
    assert "dlr-lock audit here --original small.gguf" in kept
