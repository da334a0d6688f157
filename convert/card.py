"""The model card that travels with a locked checkpoint."""

from .distill import LOCKED_GAP
from .report import ConversionReport

_TEMPLATE = """\
---
library_name: transformers
tags: [dlr-lock]
---

# {title}, locked

{summary}

```python
import dlr_lock  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
```

{status}

## What it kept

{fidelity}

| module | chain (lanes x steps x rank) | relative error | flatten gap | coupling | token visits | seconds |
|---|---|---|---|---|---|---|
{rows}

Figures are of held-out calibration text. Relative error: mean over tokens of |chain - MLP|^2 / |MLP|^2.
Flatten gap: how far the chain is from its own flattened form, on the same scale; a module below {gap} is
not called locked. Coupling: RMS of the chain's update over RMS of its input.

## What the lock does not stop

Whoever has the original weights needs nothing from this checkpoint. Tuning that leaves the chains alone
(adapters on attention, prompts), training with recomputation of activations, and distilling each chain back
into an MLP all remain possible; the last costs a fraction of this conversion for each module.

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
        status=lock_status(report),
        fidelity=_fidelity(report),
        rows="\n".join(
            f"| {m.module} | {m.spec} | {m.fidelity.rel_error:.4f} | {m.fidelity.flatten_gap:.2f}"
            f"{'' if m.fidelity.locked else ' NOT LOCKED'} | {m.fidelity.coupling:.2f} | {m.tokens:,} "
            f"| {m.seconds:.0f} |"
            for m in report.modules
        ),
        gap=LOCKED_GAP,
        parameters=f"Parameters: {report.params_locked:,} (original: {report.params_original:,}).",
        text=f"{options['data']}, {options['tokens']:,} tokens",
        recipe=(
            f"{options['start'].capitalize()} start, {options['visits']:,} token visits a module in batches of "
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


def _fidelity(report: ConversionReport) -> str:
    e = report.evaluation
    if e is None:
        return "This model has no language-model head; only the errors of the modules were measured."
    return (
        f"Loss {e.loss:.4f} nats per token (original {e.original_loss:.4f}, gap {e.loss_gap:+.4f}); perplexity "
        f"{e.perplexity:.2f} (original {e.original_perplexity:.2f}); KL to the original {e.kl:.4f} nats; the "
        f"likeliest next token differs at {100 * (e.flips or 0):.1f}% of {e.tokens:,} positions."
    )
