"""The audit's page and its terminal form: every row is there, nothing is markup but our own, and it looks right."""

import io
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from dlr_lock.audit.asymmetry import Asymmetry
from dlr_lock.audit.report import (
    AuditReport,
    Merge,
    ModuleStudents,
    Price,
    Run,
    StepCost,
    Structural,
    Student,
    Verdict,
)
from dlr_lock.audit.sections import MEASURES, audit_sections, page, verdict_words
from dlr_lock.convert import Evaluation
from dlr_lock.convert.evaluate import StateEvaluation
from dlr_lock.reporting import print_sections
from dlr_lock.reporting.words import flops_words, rate_words

HOSTILE = "<script>alert('x')</script>"
BUILD = Path(__file__).parents[2] / "build"
ATTACKS = {"full": 3.2e-4, "LoRA": 1e-3, "attention": 1e-3, "MeZO": 1e-6}
VARIANTS = {"original": 1.0, "locked": 0.8, "redistilled": 0.95}  # of the gain
TOKENS = [0, 4096, 8192, 16384, 32768, 65536]


def evaluation(gap: float) -> Evaluation:
    return Evaluation(3.1 + gap, 22.2, 8176, 3.1, 22.2, gap, 1.1 * gap, min(0.9, gap / 2))


def runs() -> list[Run]:
    made = []
    for variant, part in VARIANTS.items():
        for attack, rate in ATTACKS.items():
            start = 4.0 if variant == "locked" else 3.8
            reach = part * (0.02 if attack == "MeZO" else {"full": 1.9, "LoRA": 1.6}.get(attack, 1.4))
            for seed in range(3):
                losses = [start - reach * (1 - 0.5 ** (n / 12_000)) * (1 + 0.04 * seed) for n in TOKENS]
                losses[0] = start
                made.append(
                    Run(variant, attack, rate, seed, 512, TOKENS, losses, (3.1, 3.4 + part), 1.37, best=True)
                )
            worse = replace(
                made[-1], rate=rate / 3.16, seed=0, losses=[x + 0.01 for x in made[-1].losses], best=False
            )
            diverged = Run(
                variant, attack, rate * 3.16, 0, 512, TOKENS[:2], [start, 7.77], (3.1, None), 1.37, True
            )
            made += [worse, diverged]  # `fine_tune` gives no neutral loss after a run that diverged
    return made


def steps() -> list[StepCost]:
    made = []
    for variant, lock in (("original", 1.0), ("locked", 4.6), ("redistilled", 1.0)):
        for attack, prefix, less in (
            ("full", "", 1.0), ("LoRA", "LoRA, ", 0.7), ("attention", "LoRA on attention, ", 0.6),
        ):  # fmt: skip
            for strategy, redo, keep in (
                ("plain", 1.0, 1.0), ("layer checkpoint, plain", 1.33, 0.3), ("inversion", 1.17, 0.35),
                ("layer checkpoint, look-ahead 256, inverted", 1.4, 0.22),
            ):  # fmt: skip
                if variant == "locked" or strategy in ("plain", "layer checkpoint, plain"):
                    peak = int(2e9 * less * keep * (lock if keep == 1.0 else 1.1))
                    made.append(
                        StepCost(
                            variant, attack, prefix + strategy, 512, int(4.1e11 * less * redo), peak, peak // 2,
                            1200, 900, None if "look-ahead" in strategy else 1.37 * redo,
                        )
                    )  # fmt: skip
    mezo = replace(made[0], attack="MeZO", strategy="MeZO", flops=int(5.5e11), peak=10**8, held=0)
    return [*made, *(replace(mezo, variant=variant) for variant in VARIANTS)]


def verdicts() -> list[Verdict]:
    made = []
    for share, loss in ((0.5, 2.901), (0.9, 2.188)):
        for measure, cost in (("flops", 2.1e15), ("seconds", 4321.0), ("peak", 6.1e8)):
            for tunes in (1, 10, 100) if measure != "peak" else (1,):
                ours = Price(
                    "locked, attention", "LoRA on attention, layer checkpoint, plain", cost * 1.3, False
                )
                if tunes == 100:
                    ours = Price("redistilled, full", "plain", cost * 1.04, False)
                theirs = Price("original, full", "layer checkpoint, plain", cost, False)
                bound = share == 0.9 and measure == "seconds"
                made.append(
                    Verdict(
                        share,
                        loss,
                        measure,
                        tunes,
                        replace(ours, bound=bound),
                        theirs,
                        ours.cost / cost,
                        bound,
                    )
                )
    return [
        *made,
        Verdict(0.99, 1.9, "flops", 1, None, Price("original, full", "plain", 3e15, False), None, False),
    ]


@pytest.fixture
def report() -> AuditReport:
    modules = [
        ModuleStudents(
            f"model.layers.{layer}.mlp", "1x16x96 silu", 0.21 + 0.01 * layer, 0.94,
            [
                Student(init, tokens, tokens / 409_600, (0.21 + 0.01 * layer) * (0.97 + 9_000 / tokens * worse),
                        0.05 + 5_000 / tokens, tokens / 3_000, 0.01 + 2_000 / tokens)
                for init, worse in (("linear", 1.0), ("flat", 1.6), ("random", 5.0))
                for tokens in (25_600, 102_400, 409_600)
            ],
            [Merge(steps, (0.21 + 0.01 * layer) * (1 + 0.2 / steps**2)) for steps in (1, 2, 3)],
        )
        for layer in range(11, 15)
    ]  # fmt: skip
    asymmetries = [
        Asymmetry(mode, measure, forward, 1.1 + 0.5 * len(mode) / 7, "inversion", "plain")
        for mode in ("eager", "checkpointed", "best")
        for measure in ("flops", "launches", "dependent", "seconds")
        for forward in ("reference", "runtime")
    ]
    return AuditReport(
        locked=f"out/Modèle-gesperrt-鎖 {HOSTILE}",
        original="HuggingFaceTB/SmolLM2-135M & co",
        options={"data": f"{HOSTILE}.txt", "seeds": [0, 1, 2], "tokens": 65_536, "device": "cpu", "effort": None},
        machine={"device": "2 cores", "torch": "2.13.0", "threads": 1},
        threat="The attacker sees all weights, the architecture and this very program, but not the original's weights.",
        fidelity=evaluation(0.42),
        structural=[
            Structural("flatten", "every step reads the chain's input", evaluation(1.7), "MLP"),
            Structural("merge steps", f"pairs of steps become one; {HOSTILE}", evaluation(0.9), "chain"),
            Structural(
                "redistil", "every chain is distilled back into an MLP", evaluation(0.4), "MLP", 102_400, int(3.2e14),
                611.0,
            ),
            Structural("swap", "the original's MLPs are put back: it must be public", evaluation(0.0), "MLP"),
        ],
        modules=modules,
        runs=runs(),
        steps=steps(),
        asymmetries=asymmetries,
        verdicts=verdicts(),
        notes=["swapping in a sibling's MLPs was not run: --public was not given", f"näher: {HOSTILE}"],
        seconds=5_432.1,
    )  # fmt: skip


@pytest.fixture
def encoder(report: AuditReport) -> AuditReport:
    """Of a model without a language-model head: hidden states are compared, and nothing is learned."""
    return replace(
        report,
        fidelity=StateEvaluation(0.061, 0.9712, 4096),
        structural=[replace(row, evaluation=StateEvaluation(0.31, 0.81, 4096)) for row in report.structural],
        runs=[],
        steps=[],
        verdicts=[],
        notes=["no learning attacks: the model has no language-model head"],
    )


class Reader(HTMLParser):
    """Rows of tables, text and ids; fails where a tag is left open or an end has no beginning."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(document)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        for name, value in attrs:
            assert not name.startswith("on") and name != "src", (tag, name)
            assert "href" not in name or (value or "").startswith("#"), value

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if "style" not in self.open:
            self.text += data


def has(rows: list[list[str]], *cells: str) -> bool:
    """Whether one row begins with these cells."""
    return any(row[: len(cells)] == list(cells) for row in rows)


def test_every_row_of_every_list_is_on_the_page(report: AuditReport) -> None:
    read = Reader(page(report))
    for row in report.structural:
        assert has(read.rows, row.name, f"{row.evaluation.loss_gap:+.4f}")  # type: ignore[union-attr]
        assert row.about in read.text
    for m in report.modules:
        assert has(read.rows, m.module, m.chain, f"{m.chain_error:.4f}", f"{m.gap:.2f}")
        for c in m.students:
            assert has(read.rows, m.module, c.init, f"{c.train_tokens:,}", f"{c.share:.3g}", f"{c.error:.4f}")
    for run in report.runs:
        assert has(read.rows, run.variant, run.attack, rate_words(run.rate), str(run.seed))
        assert f"{run.tokens[-1]:,}:\N{NO-BREAK SPACE}{run.losses[-1]:.4f}" in read.text
    for step in report.steps:
        strategy = step.strategy.removeprefix("LoRA on attention, ").removeprefix("LoRA, ")
        assert has(read.rows, step.variant, step.attack, strategy, f"{step.tokens:,}", flops_words(step.flops)) or has(
            read.rows, step.variant, step.attack, strategy, f"{step.tokens:,}",
            f"{flops_words(step.flops)} ({step.flops / report.steps[0].flops:.3g})",
        )  # fmt: skip
    for a in report.asymmetries:
        assert any(
            row[:2] == [a.mode, a.forward] and any(f"{a.value:.3g}" in c for c in row) for row in read.rows
        )
    for v in report.verdicts:
        target = (f"{v.share:.0%}, loss {v.loss:.3f}", str(v.tunes))
        assert has(read.rows, *target, MEASURES[v.measure][0], v.locked.attack if v.locked else "no price")
    for words in (*report.notes, *verdict_words(report), report.threat, report.locked, report.original):
        assert words in read.text
    for row in (
        ("option", "data", f"{HOSTILE}.txt"), ("option", "seeds", "0, 1, 2"), ("option", "tokens", "65,536"),
        ("option", "device", "cpu"), ("option", "effort", "-"), ("machine", "device", "2 cores"),
        ("machine", "torch", "2.13.0"), ("machine", "threads", "1"), ("machine", "the audit took", "90.5 min"),
    ):  # fmt: skip
        assert has(read.rows, *row)


def test_the_page_is_sound_and_takes_no_markup_from_a_report(report: AuditReport) -> None:
    document = page(report)
    read = Reader(document)
    assert "script" not in read.tags and "<script" not in document.lower()
    assert len(read.ids) == len(set(read.ids))  # several drawings on one page
    assert not re.search(r"(https?:)?//(?!www\.w3\.org/)", re.sub(r"<style.*?</style>", "", document))
    assert "<?xml" not in document and "<metadata" not in document


def test_the_same_report_gives_the_same_page(report: AuditReport) -> None:
    assert page(report) == page(report)


def test_curves_are_drawn(report: AuditReport) -> None:
    pytest.importorskip("matplotlib")
    document = page(report)
    assert document.count("<svg") == 4
    assert "gain, nats a token" in Reader(document).text  # text, not outlines
    assert "pip install" not in document


def test_without_matplotlib_all_but_the_curves_is_there(
    report: AuditReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_curves = Reader(page(report)).rows
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.lines", "matplotlib.style"):
        monkeypatch.setitem(sys.modules, name, None)
    document = page(report)
    read = Reader(document)
    assert "<svg" not in document and "pip install 'dlr-lock[report]'" in read.text
    assert read.rows == with_curves


def test_a_model_without_a_head(encoder: AuditReport) -> None:
    read = Reader(page(encoder))
    assert has(read.rows, "flatten", "0.3100", "0.8100", "5.08", "MLP")
    assert "No target has a verdict" in read.text and "Not run" in read.text
    assert encoder.notes[0] in read.text


def test_nothing_at_all(encoder: AuditReport) -> None:
    empty = replace(encoder, structural=[], modules=[], asymmetries=[], notes=[], options={}, machine={})
    assert "No structural attack was run" in Reader(page(empty)).text
    assert "No structural attack was run" in printed(empty)


def test_the_verdict_in_words(report: AuditReport) -> None:
    half, most, unknown, around = verdict_words(report)
    assert half.startswith("To reach 50% of the original's best gain (a held-out loss of 2.901 nats a token)")
    assert "1.3 times the FLOPs (2.73 PFLOP against 2.1 PFLOP), 1.3 times the seconds (93.6 min" in half
    assert "(756.3 MiB against 581.7 MiB), by 'locked, attention' (layer checkpoint, plain)." in half
    assert "Where one redistillation serves 100 fine-tunes: 1.04 times the FLOPs (2.18 PFLOP" in half
    assert "(74.9 min against 72 min), by 'redistilled, full' (plain)." in half
    assert "serves 10 fine-tunes" not in half  # they change nothing
    assert half.endswith("weakest in FLOPs where one redistillation serves 100 fine-tunes: 1.04 times.")
    assert "more than 1.3 times the seconds" in most
    assert "no attack on the locked model has a price" in unknown
    assert around.startswith("'redistil' brings the model") and "320 TFLOP and 10.2 min" in around
    far = replace(report, structural=report.structural[:2])
    assert "The nearest, 'merge steps', leaves 2.14 times" in verdict_words(far)[-1]
    assert "worth nothing" in around and "worth nothing" not in verdict_words(far)[-1]
    bound = replace(report.verdicts[0], original=Price("original, full", "plain", 1.0, True), ratio=None)
    assert "no attack on the original reached it" in verdict_words(replace(report, verdicts=[bound]))[0]


def test_seeds_that_diverged_are_said(report: AuditReport) -> None:
    seeds = [run for run in report.runs if run.best and (run.variant, run.attack) == ("original", "full")]
    lost = replace(
        seeds[2], diverged=True, neutral=(3.1, None), tokens=TOKENS[:3], losses=seeds[2].losses[:3]
    )
    read = Reader(page(replace(report, runs=[*seeds[:2], lost])))
    ends = [run.losses[-1] for run in seeds[:2]]
    assert has(read.rows, "original", "full", "3.2e-4", "3, 1 diverged", f"{sum(ends) / 2:.4f}")
    hopeless = Reader(page(replace(report, runs=[replace(lost, best=False)])))
    assert has(hopeless.rows, "original", "full", "none", "0", "-", "-", "-", "-", "3.2e-4 diverged")


def printed(report: AuditReport, width: int = 100) -> str:
    out = io.StringIO()
    print_sections(Console(file=out, width=width, force_terminal=False), audit_sections(report))
    return out.getvalue()


def test_terminal(report: AuditReport, encoder: AuditReport) -> None:
    text = printed(report)
    assert all(len(line) <= 100 for line in text.splitlines())
    for row in report.structural:
        assert row.name in text
    for variant in VARIANTS:
        for attack in ATTACKS:
            assert re.search(rf"^{variant} +{attack} ", text, re.M)
    for m in report.modules:
        assert m.module in text
    assert " ".join(text.split()).count(" ".join(verdict_words(report)[0].split())) == 1
    assert report.notes[0] in text and HOSTILE in text
    assert all(len(line) <= 100 for line in printed(encoder, 200).splitlines())
    assert "[/bold] is no markup" in printed(replace(report, notes=["[/bold] is no markup"]), 60)


def test_an_attack_and_a_strategy_of_any_name_are_reported_in_their_own_words(report: AuditReport) -> None:
    attack, about = "prompt tuning", "Trains the embeddings of 20 tokens before every text"
    runs = [*report.runs, *(replace(run, attack=attack) for run in report.runs if run.attack == "full")]
    tuned = [
        StepCost("locked", attack, f"prompts, {name}", 512, 10**11, 10**9, 10**8, 90, 80, 1.0)
        for name in ("plain", "rewinding")
    ]
    new = replace(report, runs=runs, steps=[*report.steps, *tuned], attacks={attack: about})
    document = page(new)
    read = Reader(document)
    assert has(read.rows, "locked", attack, "rewinding", "512") and f"{attack}: {about}." in read.text
    assert has(read.rows, "original", attack, "3.2e-4")
    text = printed(new, 80)
    assert re.search(rf"^locked +{attack} ", text, re.M) and about in " ".join(text.split())
    if "<svg" in document:
        assert document.count(f">{attack}<") > 3  # in the keys of the plots


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine")
    return found


def test_a_browser_shows_it(report: AuditReport, browser: str, tmp_path: Path) -> None:
    """Also leaves a picture in build/audit.png."""
    file = tmp_path / "audit.html"
    file.write_text(page(report), encoding="utf-8")
    BUILD.mkdir(exist_ok=True)
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}",
    ]  # fmt: skip
    picture = [f"--screenshot={BUILD / 'audit.png'}", "--window-size=1000,5000"]
    dumped, drawn = (
        subprocess.run([*command, *job, file.as_uri()], capture_output=True, text=True, timeout=120)
        for job in (["--dump-dom"], picture)
    )
    assert dumped.returncode == drawn.returncode == 0, dumped.stderr + drawn.stderr
    assert "CONSOLE" not in dumped.stderr + drawn.stderr
    read = Reader(dumped.stdout)
    for row in report.structural:
        assert has(read.rows, row.name)
    for variant in VARIANTS:
        for attack in ATTACKS:
            assert has(read.rows, variant, attack)
    assert (BUILD / "audit.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("merges", "share", "verdict", "spent"),
    [
        ([(1, 1.2), (2, 1.04)], 3.0, "UNDONE, 1.04 untrained", ("linear", "0", "0", "0")),
        (
            [(1, 1.2), (2, 1.1), (3, 1.04)],
            3.0,
            "locked, 1.10 untrained",
            ("linear", "0", "more than 0.062", "-"),
        ),
        ([(1, 1.2)], 1.02, "UNDONE, 1.02 at 0.062x", ("linear", "25,600", "at most 0.062", "at most 1")),
    ],
)
def test_a_module_s_verdict_counts_regression_and_says_how_little_was_tried(
    report: AuditReport,
    merges: list[tuple[int, float]],
    share: float,
    verdict: str,
    spent: tuple[str, ...],
) -> None:
    """One share of students, as a quick audit has it: in data, on the terminal and on the page."""
    students = [
        Student(init, 25_600, 0.0625, 0.2 * ratio, 0.1, 9.0, 0.1)
        for init, ratio in (("linear", share), ("flat", 4.0), ("random", 5.0))
    ]
    module = replace(report.modules[0], chain_error=0.2, students=students,
                     merges=[Merge(steps, 0.2 * ratio) for steps, ratio in merges])  # fmt: skip
    report = replace(report, modules=[module])
    row = [module.module, module.chain, "0.2000", "0.94", verdict, *spent, str(merges[-1][0])]
    assert has(Reader(page(report)).rows, *row)
    shown = printed(report)
    assert all(piece in shown for piece in (*verdict.split(), *spent[2:]))
    found = report.to_dict()["modules"][0]
    assert found["verdict"] == verdict.split(",")[0] and len(found["students"]) == 3
    low = {"0": 0, "at most 0.062": 0, "more than 0.062": 0.0625}[spent[2]]
    high = {"0": 0, "at most 0.062": 0.0625, "more than 0.062": None}[spent[2]]
    assert found["undoing_over_conversion"] == {"least": low, "most": high}
