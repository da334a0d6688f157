"""The quantization method `dlr` as vLLM knows it.

vLLM asks every registered method whether a checkpoint is its own (`override_quantization_method`), long before the
model is built, and then for each linear layer what weights it has (`get_quant_method`).
"""

import sys
from types import FrameType
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.registry import ModelRegistry

from ...common.errors import DLRError
from ...common.version import __version__
from ...triton_kernels import current_backend
from ..config import METHOD, DLRConfig
from ..experts import ExpertsSpec
from .lifetime import end_with_server

PREFIX = "DLR"  # before the name of a class of vLLM's: the subclass with chains in it
_MODELS = f"{__package__}.models"
_FRAMES = 6  # between `override_quantization_method` and its ModelConfig; it is one today


def register() -> None:
    """Gives every class that vLLM can build a sibling, imported when it is wanted. More than once does no harm."""
    for name in list(ModelRegistry.get_supported_archs()):
        if not name.startswith(PREFIX):
            ModelRegistry.register_model(PREFIX + name, f"{_MODELS}:{PREFIX}{name}")


@register_quantization_config(METHOD)
class DLRQuantizationConfig(QuantizationConfig):
    """What vLLM passes from its front to its workers, pickled: the lock's description.

    Args:
        values: The `quantization_config` of config.json.

    Raises:
        DLRError: It cannot be read, or is of a newer format.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.values = dict(values)
        self.lock = DLRConfig(**values)
        self.replaced = [*self.lock.modules, *self.lock.identity]

    def __reduce__(self) -> tuple[Any, tuple[dict[str, Any]]]:
        return _in_the_engine, (self.values,)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DLRQuantizationConfig":
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claims a locked checkpoint, and has vLLM build our subclass of the class that it had chosen.

        vLLM has resolved that class by now: native, by its Transformers backend (for want of a native one, or by
        `--model-impl transformers`), with or without experts. Its ModelConfig, which knows, is not handed to us, and
        the choice could only be guessed again from `hf_config`; so it is looked up in the calls that led here.
        """
        if (hf_quant_cfg or {}).get("quant_method") != METHOD or hf_config is None:
            return None
        stock = list(hf_config.architectures or [])
        if not stock or stock[0].startswith(PREFIX):
            return METHOD
        config = _model_config(hf_config, sys._getframe(1))
        mixtures = [m for m in DLRConfig(**hf_quant_cfg).modules.values() if isinstance(m, ExpertsSpec)]
        if config is not None and mixtures:
            _serve_mixtures(config, mixtures)
        chosen = stock[0] if config is None else config.architecture
        hf_config.architectures = [PREFIX + chosen, *stock]
        if config is not None:
            config.model_impl = "auto"  # "transformers" would look for our class in transformers
        # vLLM's key of compiled graphs has config.json's values in it, and neither our backend nor our version.
        hf_config.dlr_lock = {"backend": current_backend(), "version": __version__}
        return METHOD

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """The names that vLLM has for what is replaced, where they differ from the checkpoint's."""
        self.replaced = hf_to_vllm_mapper.apply_list([*self.lock.modules, *self.lock.identity])

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """No weights for a linear layer of a replaced MLP; for every other layer what an unlocked model has."""
        if not isinstance(layer, LinearBase):
            return None
        doomed = any(prefix == name or prefix.startswith(f"{name}.") for name in self.replaced)
        return NoWeights() if doomed else UnquantizedLinearMethod()

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # bfloat16 products

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json


def _in_the_engine(values: dict[str, Any]) -> DLRQuantizationConfig:
    """What pickle calls: an engine of a locked model has begun, if this is not a copy within one process."""
    end_with_server()
    return DLRQuantizationConfig(values)


class NoWeights(LinearMethodBase):
    """For a linear layer that is gone before the weights are read: it takes no memory, and cannot be run."""

    def create_weights(self, layer: nn.Module, *sizes: Any, **more: Any) -> None:
        return

    def apply(self, layer: nn.Module, *args: Any, **more: Any) -> torch.Tensor:
        raise RuntimeError("a linear layer was run in whose place a DLR-Net should be")


def _serve_mixtures(config: ModelConfig, specs: list[ExpertsSpec]) -> None:
    """Has vLLM choose its Transformers backend, as `--model-impl transformers` does: vLLM's own experts take a router's
    logits, where those of transformers, and chains, take its choice.

    Raises:
        DLRError: The backend cannot run the model.
    """
    if config.is_hybrid:
        raise DLRError(
            "vLLM serves locked mixtures of experts by its Transformers backend, which runs attention alone, and this "
            "model has other layers, such as Mamba's: serve with --engine transformers"
        )
    config.model_impl = "transformers"
    config._model_info, config._architecture = config.registry.inspect_model_cls(config.architectures, config)
    # Experts that stay as they are run one by one, on the tokens that they have: no graph has that.
    config.enforce_eager |= any(spec.kept for spec in specs)


def _model_config(hf_config: Any, frame: FrameType | None) -> ModelConfig | None:
    """The ModelConfig of `hf_config` that one of the calling functions is a method of."""
    for _ in range(_FRAMES):
        if frame is None:
            return None
        owner = frame.f_locals.get("self")
        if isinstance(owner, ModelConfig) and owner.hf_config is hf_config:
            return owner
        frame = frame.f_back
    return None
