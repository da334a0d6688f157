"""The chains of a locked model in vLLM: put into the model, filled from the checkpoint, and checked."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.models.utils import PPMissingLayer

from ...common.errors import DLRError
from ..config import DLRConfig
from ..experts import DLRExperts, ExpertsSpec
from ..module import DLRNet
from ..quantizer import replace_module
from ..spec import DLRSpec

_RETURN_A_BIAS = ("FalconMLP",)  # MLPs of vLLM that return (y, bias or None) as linear layers do


class Chains:
    """The chains of one model of vLLM, which are in their places once this is made.

    Args:
        model: The model, on the device and in the default dtype that its weights will have. With tensor parallelism
            every rank has all of a chain: its steps follow one another, and cutting them would cost an all-reduce each.
        lock: Of config.json. What lies on another rank of a pipeline is left out.

    Raises:
        DLRError: The model has no such module.
    """

    def __init__(self, model: nn.Module, lock: DLRConfig) -> None:
        self._model = [model]  # in a list, or torch would take it for a child of itself
        self._lock = lock
        self._nets: dict[str, nn.Module | None] = {}  # by the model's names for them and by config.json's
        for name, spec in lock.modules.items():
            kind: Callable[..., nn.Module] = DLRExperts if isinstance(spec, ExpertsSpec) else ServedChain
            self._put(name, partial(kind, spec))
        for name in lock.identity:
            self._put(name, ServedIdentity)

    @torch.no_grad()
    def load(
        self, weights: Iterable[tuple[str, Tensor]], load_others: Callable[[Iterable], set[str] | None]
    ) -> set[str]:
        """Fills the chains, and has the rest loaded.

        Args:
            weights: The checkpoint's tensors by their names in it.
            load_others: The stock class's own `load_weights`, which gets what is no chain's and no tripwire.

        Returns:
            The names of the parameters that were loaded, chains' among them.

        Raises:
            DLRError: A tensor is missing, of a chain also where it has another shape or belongs to none. vLLM itself
                looks for missing weights in unquantized models alone, and serves what memory held.
        """
        for parameter in self._model[0].parameters():
            parameter.fill_(torch.nan)  # names say too little: with k_proj alone, qkv_proj counts as loaded
        loaded = load_others(self._others(weights)) or set()
        parameters = dict(self._model[0].named_parameters())
        missing = [name for name, p in parameters.items() if p.sum(dtype=torch.float32).isnan()]
        if missing:
            what = "no" if parameters[missing[0]].isnan().all() else "only a part of"
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise DLRError(f"the checkpoint has {what} {missing[0]}{more}: it is incomplete, fetch it again")
        return loaded | parameters.keys()

    def _others(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        tripwires = set(self._lock.tripwires)
        for name, tensor in weights:
            module, ours, what = name.partition(".dlr_")
            if ours:
                self._fill(module, f"dlr_{what}", tensor)
            elif name not in tripwires:
                yield name, tensor

    def _fill(self, module: str, what: str, tensor: Tensor) -> None:
        known = next((name for name in self._names(module) if name in self._nets), None)
        if known is None:
            raise DLRError(f"config.json names no chain {module}, of which the checkpoint has a {what}")
        if (net := self._nets[known]) is None:  # on another rank
            return
        parameter = dict(net.named_parameters()).get(what)
        if parameter is None or parameter.shape != tensor.shape:
            wanted = "no such tensor" if parameter is None else list(parameter.shape)
            raise DLRError(f"{module}.{what} is {list(tensor.shape)}, config.json says {wanted}")
        parameter.copy_(tensor)

    def _put(self, name: str, make: Callable[[nn.Module | None], nn.Module]) -> None:
        """Replaces the module that config.json calls `name` by what is made of it, if it is on this rank."""
        model = self._model[0]
        path = next((n for n in self._names(name) if _find(model, n) is not None), name)
        old = _find(model, path)
        new = None
        if not isinstance(old, PPMissingLayer):
            new = make(old)
            replace_module(model, path, new)
        self._nets[name] = self._nets[path] = new

    def _names(self, module: str) -> list[str]:
        """What this model may call a module that config.json, or a file, has by that name: Mixtral's files have others
        than its class in transformers."""
        mapper = getattr(self._model[0], "hf_to_vllm_mapper", None)
        return [*([] if mapper is None else mapper.apply_list([module])), module]


class Manner:
    """How a module of vLLM hands its output on, which what replaces it has to do likewise.

    Attributes:
        bias: It returns (y, None): a linear layer of vLLM leaves adding its bias to the caller.
        shares: The caller adds up y over so many ranks of tensor parallelism; 1 where the module does that itself.
    """

    def __init__(self, old: nn.Module | None) -> None:
        linear = isinstance(old, LinearBase) and old.return_bias
        self.bias = linear or type(old).__name__ in _RETURN_A_BIAS
        parts = [] if old is None else [m for m in old.modules() if isinstance(m, RowParallelLinear)]
        self.shares = max((m.tp_size for m in parts if not m.reduce_results), default=1)

    def __call__(self, y: Tensor) -> Tensor | tuple[Tensor, None]:
        """y [.., d] as the module would return it."""
        y = y / self.shares if self.shares > 1 else y
        return (y, None) if self.bias else y


class ServedChain(DLRNet):
    """A DLRNet that answers in the manner of the module that it replaces, with no gradients."""

    def __init__(self, spec: DLRSpec, old: nn.Module | None) -> None:
        super().__init__(spec)
        self.manner = Manner(old)
        self.quant_method = _PrepareChains()

    def forward(self, x: Tensor) -> Any:
        return self.manner(super().forward(x))


class ServedIdentity(nn.Module):
    """Hands its input on in the manner of the module that it replaces."""

    def __init__(self, old: nn.Module | None) -> None:
        super().__init__()
        self.manner = Manner(old)

    def forward(self, x: Tensor) -> Any:
        return self.manner(x)


class _PrepareChains(QuantizeMethodBase):
    """vLLM's call after the weights are in place, before it compiles or captures: the Gram blocks are computed then."""

    supports_pre_processed_weights = True  # the weights themselves stay as they are

    def create_weights(self, layer: nn.Module, *args: Any, **more: Any) -> None:
        return

    def apply(self, layer: nn.Module, *args: Any, **more: Any) -> Tensor:
        return layer(*args)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        assert isinstance(layer, ServedChain)
        layer.prepare()


def _find(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, or the missing layer of a pipeline that it would be in; None where there is neither."""
    module = model
    for part in path.split("."):
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            return None
        module = child
        if isinstance(module, PPMissingLayer):
            break
    return module
