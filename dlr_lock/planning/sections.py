"""A plan as sections."""

from ..reporting import Section, Table, headings
from ..reporting.words import bytes_words, cell, count_words, flops_words, seconds_words
from .plan import Plan


def plan_sections(plan: Plan) -> list[Section]:
    """The whole in words, a row a phase, and what to change."""
    chains = sorted({module["chain"] for module in plan.modules})
    options = plan.options
    device = f", {bytes_words(plan.device)} on the GPU" if plan.device else ""
    many, each = (f"{plan.processes} GPUs, each ", " a process") if plan.processes > 1 else ("", "")
    text = (
        f"{plan.source}: {plan.params / 1e9:,.3g} billion parameters, {len(plan.modules)} of {plan.mlps} MLPs to be "
        f"replaced by {', '.join(chains)}; effort {options['effort']}, "
        f"{count_words(plan.tokens, 'calibration token')}, {options['train_tokens']:,} training tokens a module.\n"
        f"On {many}{plan.rates.name} ({plan.rates.how}): about {seconds_words(plan.seconds)}, "
        f"{bytes_words(plan.host)} of memory{device}{each}, {bytes_words(plan.disk)} of disk with the source, "
        f"{flops_words(plan.flops)}{each}."
    )
    rows = [
        (
            phase.name,
            flops_words(phase.flops) if phase.flops else "-",
            seconds_words(plan.rates.seconds(phase)),
            bytes_words(plan.base + phase.host),
            cell(phase.device or None, bytes_words),
            bytes_words(phase.disk),
        )
        for phase in plan.phases
    ]
    table = Table(headings("phase | FLOPs | time | memory | GPU's memory | disk"), rows).filled()
    notes = [f"a change: {line}" if line.startswith("--") and ": " in line else line for line in plan.advice]
    return [Section("The plan", text, table, notes)]
