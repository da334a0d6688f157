"""What a conversion did, as figures: for --json, for the manifest and for the model card."""

from dataclasses import dataclass, field
from typing import Any

from ..runtime import DLRSpec
from .distill import Fidelity
from .evaluate import Evaluation


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One locked module. tokens: token visits of its distillation; seconds: of the distillation alone."""

    module: str
    layer: int
    spec: DLRSpec
    params_original: int
    fidelity: Fidelity
    tokens: int
    seconds: float

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
        }


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """A conversion: `out` is the checkpoint, `options` every choice that led to it.

    mlps: how many MLPs the original has, locked or not. params_original, params_locked: of the whole models.
    evaluation: the locked model against the original on held-out text, None without a language-model head.
    seconds: of the whole conversion.
    """

    source: str
    out: str
    options: dict[str, Any]
    modules: list[ModuleReport]
    mlps: int
    params_original: int
    params_locked: int
    evaluation: Evaluation | None
    seconds: float
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
            "evaluation": self.evaluation.to_dict() if self.evaluation else None,
            "seconds": round(self.seconds, 2),
            "program": self.program,
        }
