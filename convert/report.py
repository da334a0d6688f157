"""What a conversion did, as figures: for --json, for the manifest and for the model card."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..runtime import DLRNet, DLRSpec
from .evaluate import LOCKED_GAP, Evaluation, Fidelity, StateEvaluation

# A student is as good as the chain when its error against the MLP is at most so many times the chain's.
UNDONE = 1.05


@dataclass(frozen=True, slots=True)
class Redistillation:
    """The attack on one module's chain: an MLP of its size, the student, fitted to it.

    Attributes:
        train_tokens: Training tokens that the attacker spent.
        conversion: Those that the chain cost.
        error: The student's relative error against the original MLP, on held-out tokens as in `Fidelity`.
        chain_error: The chain's own.
        student_error: The student's against the chain.
    """

    train_tokens: int
    conversion: int
    error: float
    chain_error: float
    student_error: float

    @property
    def undone(self) -> bool:
        """Whether the student is as good as the chain."""
        return self.error <= UNDONE * self.chain_error

    @property
    def cost(self) -> float:
        """The attacker's training tokens as a share of the conversion's."""
        return self.train_tokens / self.conversion

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, and what follows from them."""
        return {**asdict(self), "undone": self.undone, "cost": self.cost}


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One locked module. train_tokens: training tokens of its distillation; seconds: of the distillation alone.

    drift: how far the locked model's hidden states are from the original's behind the layer, the mean over tokens
    of |locked - original|^2 / |original|^2; None where modules were distilled independently. redistillation: the
    attack on it, where that was measured. notes: what the owner should know of it, a sentence each.
    """

    module: str
    layer: int
    spec: DLRSpec
    params_original: int
    fidelity: Fidelity
    train_tokens: int
    seconds: float
    drift: float | None = None
    redistillation: Redistillation | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "layer": self.layer,
            **self.fidelity.to_dict(),
            "train_tokens": self.train_tokens,
            "seconds": round(self.seconds, 2),
            "params_original": self.params_original,
            "params_locked": self.spec.params,
            "spec": self.spec.to_dict(),
            "drift": self.drift,
            "redistillation": self.redistillation.to_dict() if self.redistillation else None,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModuleReport":
        """The inverse of `to_dict`."""

        def part(kind: type) -> Any:
            source = values["redistillation"] if kind is Redistillation else values
            return kind(**{field.name: source[field.name] for field in fields(kind)})

        return cls(
            values["module"],
            values["layer"],
            DLRSpec.from_dict(values["spec"]),
            values["params_original"],
            part(Fidelity),
            values["train_tokens"],
            values["seconds"],
            values["drift"],
            part(Redistillation) if values["redistillation"] else None,
            tuple(values["notes"]),
        )


@dataclass
class Modules:
    """The fitted chains by module name, in the checkpoint's dtype on the CPU, and a report each, in model order.

    across: 'sequential' or 'independent', as it was done.
    """

    chains: dict[str, DLRNet]
    reports: list[ModuleReport]
    across: str


@dataclass(frozen=True, slots=True)
class EndToEndReport:
    """The end-to-end phase: its training tokens and seconds, and the figures before and after it.

    gaps: the smallest flatten gap of any module, over |chain|^2, on the locked model's own held-out activations.
    weakest: the module of the smallest gap after it; redistillation: the attack on that one, on the original's activations,
    None where no attack was asked for.
    """

    train_tokens: int
    seconds: float
    evaluation_before: Evaluation | StateEvaluation
    evaluation_after: Evaluation | StateEvaluation
    smallest_gap_before: float
    smallest_gap_after: float
    weakest: str
    redistillation_before: Redistillation | None = None
    redistillation_after: Redistillation | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "train_tokens": self.train_tokens,
            "seconds": round(self.seconds, 2),
            "evaluation_before": self.evaluation_before.to_dict(),
            "evaluation_after": self.evaluation_after.to_dict(),
            "smallest_gap_before": self.smallest_gap_before,
            "smallest_gap_after": self.smallest_gap_after,
            "weakest": self.weakest,
            "redistillation_before": self.redistillation_before.to_dict()
            if self.redistillation_before
            else None,
            "redistillation_after": self.redistillation_after.to_dict()
            if self.redistillation_after
            else None,
        }


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """A conversion: `out` is the checkpoint, `options` every choice that led to it.

    mlps: how many MLPs the original has, locked or not. params_original, params_locked: of the whole models.
    evaluation: the locked model against the original on held-out text. across: 'sequential' or 'independent'.
    end_to_end: the phase, where there was one. warnings: what the owner should know, a sentence each.
    seconds: of the whole conversion, an interrupted one's first part left out.
    """

    source: str
    out: str
    options: dict[str, Any]
    modules: list[ModuleReport]
    mlps: int
    params_original: int
    params_locked: int
    evaluation: Evaluation | StateEvaluation
    seconds: float
    across: str
    end_to_end: EndToEndReport | None = None
    warnings: list[str] = field(default_factory=list)
    program: dict[str, str] = field(default_factory=dict)

    @property
    def not_locked(self) -> list[str]:
        """The converted modules whose flatten gap is too small to call them locked."""
        return [m.module for m in self.modules if not m.fidelity.locked]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {
            "source": self.source,
            "out": self.out,
            "options": self.options,
            "modules": [m.to_dict() for m in self.modules],
            "mlps": self.mlps,
            "not_locked": self.not_locked,
            "params_original": self.params_original,
            "params_locked": self.params_locked,
            "evaluation": self.evaluation.to_dict(),
            "across": self.across,
            "end_to_end": self.end_to_end.to_dict() if self.end_to_end else None,
            "warnings": self.warnings,
            "seconds": round(self.seconds, 2),
            "program": self.program,
        }


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

| module | chain | relative error | first tokens | flatten gap | coupling | hidden states | redistillation | training tokens | s |
|---|---|---|---|---|---|---|---|---|---|
{rows}

Figures are of held-out calibration text. Relative error: mean over tokens of |chain - target|^2 / |target|^2;
the target is {target}. Flatten gap: how far the chain is from its own flattened form, on the same scale; a
module below {gap} is not called locked. Coupling: RMS of the chain's update over RMS of its input. Hidden
states: their relative error behind the layer, with all that was locked before. Redistillation: the best attack known
to us on a single module, distilling the chain back into an MLP: the relative error of the student, and the share of
the module's own training tokens that it was given; "undone" where the student is as good as the chain.{notes}

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
            f"Effort {options['effort']}: modules {report.across}, {options['init']} initialisation, "
            f"{options['train_tokens']:,} training tokens a module in batches of "
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


def redistillation_words(redistillation: Redistillation | None) -> str:
    """An attack's outcome in a table's cell."""
    if redistillation is None:
        return "not measured"
    outcome = "undone" if redistillation.undone else "not undone"
    return f"{outcome}: {redistillation.error:.3f} at {redistillation.cost:.2g}x"


def _row(m: ModuleReport) -> str:
    cells = (
        m.module,
        str(m.spec),
        f"{m.fidelity.rel_error:.4f}",
        "-" if m.fidelity.first_error is None else f"{m.fidelity.first_error:.4f}",
        f"{m.fidelity.flatten_gap:.2f}" + ("" if m.fidelity.locked else " NOT LOCKED"),
        f"{m.fidelity.coupling:.2f}",
        "-" if m.drift is None else f"{m.drift:.4f}",
        redistillation_words(m.redistillation),
        f"{m.train_tokens:,}",
        f"{m.seconds:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def _fidelity(report: ConversionReport) -> str:
    words = evaluation_words(report.evaluation)
    if report.end_to_end is None:
        return words
    t = report.end_to_end
    undoing = ""
    if t.redistillation_before and t.redistillation_after:
        undoing = (
            f" Undoing {t.weakest}, which has it now: {redistillation_words(t.redistillation_before)} before, "
            f"{redistillation_words(t.redistillation_after)} now."
        )
    return (
        f"{words}\n\nThe last {t.train_tokens:,} training tokens trained all chains together on the original's output. "
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
