"""What config.json says of a lock, under transformers' `quantization_config`."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from dlr_lock_autoload import METHOD

from ..common.errors import DLRError
from .experts import ExpertsSpec, spec_from
from .spec import DLRSpec

FORMAT = 2  # of the checkpoint; a reader refuses a newer one
_WITHOUT_EXPERTS = 1  # what is written where no mixture is locked, for readers of before


class DLRConfig(QuantizationConfigMixin):
    """Which modules of a transformers model are DLR-Nets. Names are those of the class in `architectures`.

    Args:
        modules: Module name to its DLRSpec, of a mixture's experts to its ExpertsSpec, or to that as plain values.
        identity: The modules that became the identity, where the MLP had no module of its own (OPT's activation_fn
            and fc2).
        tripwires: Stock weights that are stored with a shape that no MLP has, on which a transformers without dlr_lock
            stumbles instead of filling the locked MLPs with random weights.
        format: Of the checkpoint.
        quant_method: Always 'dlr'.

    Raises:
        DLRError: On a newer format, and on anything that is not a lock's description.
    """

    def __init__(
        self,
        modules: Mapping[str, dict[str, Any] | DLRSpec | ExpertsSpec] | None = None,
        identity: list[str] | None = None,
        tripwires: list[str] | None = None,
        format: int | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if format is not None and (not isinstance(format, int) or format > FORMAT):
            raise DLRError(
                f"the checkpoint has format {format}, this dlr-lock reads up to {FORMAT}: upgrade dlr-lock"
            )
        if unknown:
            raise DLRError(
                f"config.json's quantization_config has unknown fields: {', '.join(sorted(unknown))}"
            )
        if not isinstance(modules, dict) or not modules:
            raise DLRError("config.json's quantization_config names no modules")
        self.quant_method = quant_method
        self.modules = {
            name: spec if isinstance(spec, DLRSpec | ExpertsSpec) else spec_from(spec)
            for name, spec in modules.items()
        }
        self.format = format or (FORMAT if self.mixtures else _WITHOUT_EXPERTS)
        self.identity = list(identity or [])
        self.tripwires = list(tripwires or [])

    @property
    def mixtures(self) -> list[str]:
        """The modules that are the experts of a mixture."""
        return [name for name, spec in self.modules.items() if isinstance(spec, ExpertsSpec)]

    def rename(self, to: Callable[[str], str]) -> None:
        """Gives every module and tripwire another name."""
        self.modules = {to(name): spec for name, spec in self.modules.items()}
        self.identity = [to(name) for name in self.identity]
        self.tripwires = [to(name) for name in self.tripwires]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json; `DLRConfig(**values)` is the inverse."""
        return {
            "quant_method": self.quant_method,
            "format": self.format,
            "modules": {name: spec.to_dict() for name, spec in self.modules.items()},
            "identity": list(self.identity),
            "tripwires": list(self.tripwires),
        }

    def __iter__(self):
        yield from self.to_dict().items()
