"""Redistillation, module by module, as a section of an audit."""

from ..reporting import Curve, Plot, Section, Table, grouped, headings
from ..reporting.lock_verdict import UNDONE_RATIO
from ..reporting.words import ratio_words, seconds_words
from .report import AuditReport, ModuleStudents, Student

_COST = ("initialisation", "training tokens")


def module_section(report: AuditReport) -> Section:
    """What undoes each chain: its students, and regression alone."""

    def row(m: ModuleStudents) -> tuple[str, ...]:
        best = m.judgement.attempt
        made = ("-", "-") if best is None else (best.init, f"{best.tokens:,}")
        spent = map(str, m.undoing.values())
        depth = str(m.merges[-1].steps) if m.merges else "-"
        figures = f"{m.chain_error:.4f}", f"{m.gap:.2f}", str(m.judgement)
        return m.module, m.chain, *figures, *made, *spent, depth

    def every(m: ModuleStudents, c: Student) -> tuple[str, ...]:
        return (
            m.module, c.init, f"{c.train_tokens:,}", ratio_words(c.share), f"{c.error:.4f}", f"{c.student_error:.4f}",
            ratio_words(m.ratio(c)), f"{c.distance:.4f}", seconds_words(c.seconds),
        )  # fmt: skip

    curves = [
        Curve([c.train_tokens for c in made], [m.ratio(c) for c in made], init)
        for m in report.modules
        for init, made in grouped(sorted(m.students, key=lambda c: c.train_tokens), lambda c: c.init).items()
    ]
    plot = Plot(
        "the students' errors against their training tokens", "training tokens", "student's error / chain's", curves,
        [1], log=True,
    )  # fmt: skip
    best = (
        "module | chain | relative error | flatten gap | verdict | initialisation | training tokens | "
        "undoing / conversion | undoing / fresh | steps that count"
    )
    columns = (
        "module | initialisation | training tokens | share | error | error against the chain | ratio | "
        "model's distance | seconds"
    )
    return Section(
        "Redistillation, module by module",
        f"A chain counts as undone where a student's error is at most {UNDONE_RATIO} times the chain's own, both "
        "against what the chain was fitted to, or that of one or two wide steps that linear regression alone makes of "
        "it. A row's verdict is of the cheapest of these, or else of the best. "
        "Fine-tunes of the redistilled model take, for each chain, the student that alone in its place leaves the "
        "model nearest to the locked one. Steps that count: the fewest wide steps as good as the "
        "chain that linear regression alone makes of it, before any training; they are what the lock keeps of its "
        "depth.",
        Table(headings(best), list(map(row, report.modules)), minor=_COST, empty="Not run; the notes say why."),
        plots=[plot] if curves else [],
        caption="A line is a module, its colour the student's initialisation; below the dashed level the student is "
        "better than the chain itself.",
        details=[
            Table(headings(columns), [every(m, c) for m in report.modules for c in m.students], "Every student"),
            Table(
                headings("module | wide steps | error | ratio"),
                [
                    (m.module, str(merge.steps), f"{merge.error:.4f}", ratio_words(m.ratio(merge)))
                    for m in report.modules
                    for merge in m.merges
                ],
                "Steps merged by regression alone",
            ),
        ],
    )  # fmt: skip
