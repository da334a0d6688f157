"""Model classes of vLLM with chains in them, made when vLLM asks for one: `models.DLRLlamaForCausalLM`.

A class that vLLM has written for its architecture builds its MLPs first, without weights (`NoWeights`), and they are
replaced. One of vLLM's Transformers backend takes transformers' own modules and replaces what is in them: there the
chains have to come first.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.transformers.base import Base as TransformersBackend

from .chains import Chains
from .quantization import PREFIX

_StockClass: Any = object  # it is known when a class is made


class _Locked(_StockClass):
    """What both kinds have in common."""

    config: Any
    chains: Chains

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fills the chains itself, as vLLM's own loaders know no such tensors, and checks that all weights came."""
        return self.chains.load(weights, super().load_weights)


class _Native(_Locked):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        with _stock_names(vllm_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.chains = Chains(self, vllm_config.quant_config.lock)


class _Backend(_Locked):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        with _stock_names(vllm_config):  # transformers' renamings are looked up by them: gpt_neox's embed_out
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    def recursive_replace(self) -> None:
        # What vLLM fuses as a mixture's experts has three dimensions in all of its weights, which chains have not.
        self.chains = Chains(self, self.vllm_config.quant_config.lock)
        super().recursive_replace()


@contextmanager
def _stock_names(vllm_config: Any) -> Iterator[None]:
    """config.json's own `architectures`, without the name that `override_quantization_method` put before them."""
    config = vllm_config.model_config.hf_config
    names = config.architectures
    config.architectures = [name for name in names if not name.startswith(PREFIX)]
    try:
        yield
    finally:
        config.architectures = names


@cache
def _locked_class(name: str) -> type[nn.Module]:
    stock = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
    kind = _Backend if issubclass(stock, TransformersBackend) else _Native
    return type(name, (kind, stock), {"__module__": __name__})


def __getattr__(name: str) -> type[nn.Module]:
    if not name.startswith(PREFIX) or name.removeprefix(PREFIX) not in ModelRegistry.models:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return _locked_class(name)
