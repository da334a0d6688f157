"""What a conversion did, as figures: for --json, for the manifest and for the model card."""

from dataclasses import dataclass, field, fields
from typing import Any

from ..runtime import DLRSpec
from .evaluate import Evaluation, StateEvaluation
from .fidelity import Fidelity
from .unlock import Unlocking


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One locked module. tokens: token visits of its distillation; seconds: of the distillation alone.

    drift: how far the locked model's hidden states are from the original's behind the layer, the mean over tokens
    of |locked - original|^2 / |original|^2; None where modules were distilled independently. unlocking: the
    attack on it, where that was measured. notes: what the owner should know of it, a sentence each.
    """

    module: str
    layer: int
    spec: DLRSpec
    params_original: int
    fidelity: Fidelity
    tokens: int
    seconds: float
    drift: float | None = None
    unlocking: Unlocking | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "layer": self.layer,
            **self.fidelity.to_dict(),
            "tokens": self.tokens,
            "seconds": round(self.seconds, 2),
            "params_original": self.params_original,
            "params_locked": self.spec.params,
            "spec": self.spec.to_dict(),
            "drift": self.drift,
            "unlocking": self.unlocking.to_dict() if self.unlocking else None,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModuleReport":
        """The inverse of `to_dict`."""

        def part(kind: type) -> Any:
            source = values["unlocking"] if kind is Unlocking else values
            return kind(**{field.name: source[field.name] for field in fields(kind)})

        return cls(
            values["module"],
            values["layer"],
            DLRSpec.from_dict(values["spec"]),
            values["params_original"],
            part(Fidelity),
            values["tokens"],
            values["seconds"],
            values["drift"],
            part(Unlocking) if values["unlocking"] else None,
            tuple(values["notes"]),
        )


@dataclass(frozen=True, slots=True)
class Together:
    """The end-to-end phase: its token visits and seconds, and the figures before and after it.

    gaps: the smallest flatten gap of any module, over |chain|^2, on the locked model's own held-out activations.
    weakest: the module of the smallest gap after it; unlocking: the attack on that one, on the original's activations,
    None where no attack was asked for.
    """

    visits: int
    seconds: float
    evaluation_before: Evaluation | StateEvaluation
    evaluation_after: Evaluation | StateEvaluation
    smallest_gap_before: float
    smallest_gap_after: float
    weakest: str
    unlocking_before: Unlocking | None = None
    unlocking_after: Unlocking | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "visits": self.visits,
            "seconds": round(self.seconds, 2),
            "evaluation_before": self.evaluation_before.to_dict(),
            "evaluation_after": self.evaluation_after.to_dict(),
            "smallest_gap_before": self.smallest_gap_before,
            "smallest_gap_after": self.smallest_gap_after,
            "weakest": self.weakest,
            "unlocking_before": self.unlocking_before.to_dict() if self.unlocking_before else None,
            "unlocking_after": self.unlocking_after.to_dict() if self.unlocking_after else None,
        }


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """A conversion: `out` is the checkpoint, `options` every choice that led to it.

    mlps: how many MLPs the original has, locked or not. params_original, params_locked: of the whole models.
    evaluation: the locked model against the original on held-out text. across: 'sequential' or 'independent'.
    together: the end-to-end phase, where there was one. warnings: what the owner should know, a sentence each.
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
    together: Together | None = None
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
            "together": self.together.to_dict() if self.together else None,
            "warnings": self.warnings,
            "seconds": round(self.seconds, 2),
            "program": self.program,
        }
