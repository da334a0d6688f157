"""The model card that travels with a locked checkpoint."""

from .evaluate import Evaluation, StateEvaluation
from .fidelity import LOCKED_GAP
from .report import ConversionReport, ModuleReport
from .unlock import Unlocking

_LOAD = """\
import dlr_lock  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")"""
_LOAD_OTHER = """\
import dlr_lock

model = dlr_lock.load("path/to/this/directory")"""
_TARGETS = {
    "sequential": "what brings the locked model's hidden states back to the original's",
    "independent": "the MLP's output in the original",
}

_TEMPLATE = """\
---
library_name: transformers
tags: [dlr-lock]
---

# {title}, locked

{summary}

```python
{load}
```

{status}

## What it kept

{fidelity}

| module | chain | relative error | first tokens | flatten gap | coupling | hidden states | unlocking | visits | s |
|---|---|---|---|---|---|---|---|---|---|
{rows}

Figures are of held-out calibration text. Relative error: mean over tokens of |chain - target|^2 / |target|^2;
the target is {target}. Flatten gap: how far the chain is from its own flattened form, on the same scale; a
module below {gap} is not called locked. Coupling: RMS of the chain's update over RMS of its input. Hidden
states: their relative error behind the layer, with all that was locked before. Unlocking: the best attack known
to us on a single module, distilling the chain back into an MLP: the relative error of its copy, and the share of
the module's own token visits that it was given; "undone" where the copy is as good as the chain.{notes}

## What the lock does not stop

Whoever has the original weights needs nothing from this checkpoint. Tuning that leaves the chains alone
(adapters on attention, prompts), training with recomputation of activations, and distilling each chain back
into an MLP all remain possible; the table above says what the last costs.

## How it was made

{parameters} Calibration text: {text}. {recipe}
"""


def model_card(report: ConversionReport) -> str:
    """The README.md of a converted checkpoint, in markdown."""
    options = report.options
    return _TEMPLATE.format(
        title=report.source.rstrip("/").rsplit("/", 1)[-1],
        summary=(
            f"{len(report.modules)} of the {report.mlps} MLPs of this model are DLR-Nets: deep chains of low-rank "
            "steps that run like an MLP and are expensive to train. Load it with `pip install dlr-lock`:"
        ),
        load=_LOAD if isinstance(report.evaluation, Evaluation) else _LOAD_OTHER,
        status=lock_status(report),
        fidelity=_fidelity(report),
        rows="\n".join(map(_row, report.modules)),
        target=_TARGETS[report.across],
        notes="".join(f"\n\nNote: {warning}." for warning in report.warnings),
        gap=LOCKED_GAP,
        parameters=f"Parameters: {report.params_locked:,} (original: {report.params_original:,}).",
        text=f"{options['data']}, {options['tokens']:,} tokens",
        recipe=(
            f"Effort {options['effort']}: modules {report.across}, {options['start']} start, "
            f"{options['visits']:,} token visits a module in batches of "
            f"{options['batch']:,}, seed {options['seed']}, weights in {options['dtype']}, "
            f"{', '.join(f'{name} {version}' for name, version in report.program.items())}."
        ),
    )


def lock_status(report: ConversionReport) -> str:
    """One sentence: whether every converted module is locked, and which are not."""
    if not report.not_locked:
        return f"All {len(report.modules)} converted modules are locked (flatten gap at least {LOCKED_GAP})."
    return (
        f"NOT LOCKED: {', '.join(report.not_locked)} (flatten gap under {LOCKED_GAP}; flattening gives the MLP "
        "back nearly for free)."
    )


def unlock_words(unlocking: Unlocking | None) -> str:
    """An attack's outcome in a table's cell."""
    if unlocking is None:
        return "not measured"
    outcome = "undone" if unlocking.undone else "not undone"
    return f"{outcome}: {unlocking.error:.3f} at {unlocking.cost:.2g}x"


def _row(m: ModuleReport) -> str:
    cells = (
        m.module,
        str(m.spec),
        f"{m.fidelity.rel_error:.4f}",
        "-" if m.fidelity.first_error is None else f"{m.fidelity.first_error:.4f}",
        f"{m.fidelity.flatten_gap:.2f}" + ("" if m.fidelity.locked else " NOT LOCKED"),
        f"{m.fidelity.coupling:.2f}",
        "-" if m.drift is None else f"{m.drift:.4f}",
        unlock_words(m.unlocking),
        f"{m.tokens:,}",
        f"{m.seconds:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def _fidelity(report: ConversionReport) -> str:
    words = evaluation_words(report.evaluation)
    if report.together is None:
        return words
    t = report.together
    undoing = ""
    if t.unlocking_before and t.unlocking_after:
        undoing = (
            f" Undoing {t.weakest}, which has it now: {unlock_words(t.unlocking_before)} before, "
            f"{unlock_words(t.unlocking_after)} now."
        )
    return (
        f"{words}\n\nThe last {t.visits:,} token visits trained all chains together on the original's output. "
        f"Before: {evaluation_words(t.evaluation_before)} The smallest flatten gap of a module, over |chain|^2, was "
        f"{t.smallest_gap_before:.2f} before and is {t.smallest_gap_after:.2f}.{undoing} The table is of the modules "
        "before it."
    )


def evaluation_words(e: Evaluation | StateEvaluation) -> str:
    """An evaluation in a sentence."""
    if isinstance(e, StateEvaluation):
        return (
            f"Last hidden states: relative error {e.state_error:.4f} to the original's; cosine of mean-pooled "
            f"sequences {e.cosine:.4f}, over {e.tokens:,} tokens."
        )
    return (
        f"Loss {e.loss:.4f} nats per token (original {e.original_loss:.4f}, gap {e.loss_gap:+.4f}); perplexity "
        f"{e.perplexity:.2f} (original {e.original_perplexity:.2f}); KL to the original {e.kl:.4f} nats; the "
        f"likeliest next token differs at {100 * (e.flips or 0):.1f}% of {e.tokens:,} positions."
    )
