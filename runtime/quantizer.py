"""The transformers plugin: how a locked checkpoint loads through plain `from_pretrained`.

Importing this module registers the quantization method `dlr`. transformers then hands every checkpoint whose
config names that method to `DLRQuantizer`, which puts DLRNets in place before the weights are read. Where the package
is installed nobody needs to import it: `dlr_lock_autoload` has put stand-ins where these classes go.
"""

import copy
import re
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from dlr_lock_autoload import METHOD, StandIn

from ..common.errors import DLRError
from ..triton_kernels import current_backend
from .config import DLRConfig
from .experts import DLRExperts, empty_chains
from .module import DLRNet
from .spec import DLRSpec

logger = logging.get_logger(__name__)

HINT = "this_model_needs.pip_install_dlr-lock"  # a tensor: a transformers without us lists it before it stops


class DLRQuantizer(HfQuantizer):
    """Builds, checks and re-saves locked models inside transformers."""

    requires_calibration = True  # asked for on an unlocked model, it is a ValueError and not a no-op
    quantization_config: DLRConfig
    _model: weakref.ref[PreTrainedModel] | None = None
    unplaced: dict[str, Tensor] = {}  # noqa: RUF012 (replaced whole) of a source, which are written as they are

    def watch(self, model: PreTrainedModel) -> None:
        """Remembers whose quantizer this is, for what is said when it is trained."""
        self._model = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        # references are not pickled
        return {name: value for name, value in vars(self).items() if name != "_model"}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Asked by transformers' Trainer: within `backend("naive")`, for chains have no other backward.

        Raises:
            DLRError: Where that is not so, or nothing of the model is to be trained.
        """
        if current_backend() != "naive":
            raise DLRError(
                "a locked model is trained by its definition alone: make the Trainer and train within "
                "`with dlr_lock.backend('naive'):`, or with DLR_LOCK_BACKEND=naive"
            )
        model = self._model() if self._model is not None else None
        if model is None:
            return True
        if not any(p.requires_grad for p in model.parameters()):
            raise DLRError(
                "no weight of this locked model requires gradients: attach adapters, or call "
                "model.requires_grad_(True)"
            )
        if not any(p.requires_grad for _, net in locked(model) for p in net.parameters()):
            logger.warning_once(
                "The chains of this locked model stay as they are: adapters such as PEFT's are put on linear layers, "
                "also by target_modules='all-linear', and chains have none."
            )
        return True

    @property
    def is_qat_trainable(self) -> bool:  # without adapters, too
        return True

    @property
    def is_compileable(self) -> bool:  # or generate() never compiles by itself
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        # Runs under transformers' meta device and load dtype, which the new modules inherit.
        config = self.quantization_config
        config.rename(_names_in(model, config))
        install(model, config)
        ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        ignored.update(rf"(^|\.){re.escape(name)}$" for name in config.tripwires)
        # transformers reports an expert's tripwire by the name of the fused weight that it would have made of it
        ignored.update(rf"(^|\.){re.escape(name)}\.(?!dlr_)" for name in config.mixtures)
        model._keys_to_ignore_on_load_unexpected = ignored

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> PreTrainedModel:
        # transformers only warns of missing weights and draws random ones. Tied ones are not stored, offloaded ones
        # not here, and what the saved class has not (a classifier's head) is new and there to be trained.
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        absent = {
            name: parameter
            for name, parameter in model.named_parameters()
            if not getattr(parameter, "_is_hf_initialized", False)
            and not parameter.is_meta
            and name not in tied
        }
        # Sinusoids that a class makes anew (Marian's) are weights by their kind alone.
        unsaved = [re.compile(key) for key in getattr(model, "_keys_to_ignore_on_save", None) or ()]
        absent = {name: p for name, p in absent.items() if not any(key.search(name) for key in unsaved)}
        saved = _names_of_the_saved(model) if absent else set()
        for name in absent:
            if name.rpartition(".")[2].startswith("dlr_") or _bare(name, model) in saved:
                raise DLRError(f"the checkpoint has no {name}: it is incomplete, fetch it again")
        model.requires_grad_(False)  # loading re-wraps every weight as trainable
        for parameter in absent.values():
            parameter.requires_grad_(True)
        for _, net in locked(model):
            for vector in (net.dlr_scale, net.dlr_bias):
                # Float32 in every file, they are parts of it in memory: of a bfloat16 checkpoint loaded as float32 they
                # alone would keep it mapped, 257 MiB resident beside 516 of weights.
                vector.data = vector.data.clone()
            net.prepare()
        self.watch(model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        _refuse_gated(self.quantization_config)
        tripwires = {name: torch.zeros(1) for name in self.quantization_config.tripwires}
        for name, experts in locked_experts(model):
            for wire in tripwires:
                if wire.rpartition(".")[0] == name:  # a rule of Qwen3-VL's looks up its shape in the model
                    vars(experts)[wire.rpartition(".")[2]] = nn.Parameter(
                        tripwires[wire], requires_grad=False
                    )
        return model.state_dict() | self.unplaced | tripwires, {}


def register() -> None:
    """Tells transformers of the method `dlr`; once is enough.

    Raises:
        DLRError: Where another package has registered a method of this name.
    """
    tables = ((auto.AUTO_QUANTIZATION_CONFIG_MAPPING, DLRConfig), (auto.AUTO_QUANTIZER_MAPPING, DLRQuantizer))
    for table, ours in tables:
        there = table.get(METHOD)
        if there is not None and there is not ours and not isinstance(there, StandIn):
            raise DLRError(f"another package has registered a method {METHOD!r} with transformers: {there}")
        table[METHOD] = ours


register()


def install(model: nn.Module, config: DLRConfig) -> None:
    """Puts a DLRNet, or DLRExperts, in the default dtype and device, in the place of every module that `config` names.

    Raises:
        DLRError: Where the model has no such module.
    """
    for name, spec in config.modules.items():
        stock = model.get_submodule(name) if _has(model, name) else None
        replace_module(model, name, empty_chains(spec, stock))
    for name in config.identity:
        replace_module(model, name, nn.Identity())


def lock(
    model: PreTrainedModel,
    chains: Mapping[str, DLRNet | DLRExperts],
    identity: list[str],
    unplaced: dict[str, Tensor] | None = None,
) -> None:
    """Turns a loaded transformers model into a locked one, in place: it saves and runs as if loaded locked.

    Args:
        model: Any transformers model.
        chains: Module name to the filled DLRNet, or DLRExperts, that takes its place.
        identity: Modules that become nn.Identity besides.
        unplaced: Tensors that the model's class has no place for and that are saved with it.

    Raises:
        DLRError: Where a chain is gated, which is no lock, and where the model has no such module.
    """
    tripwires = [_tripwire(model, name) for name in chains]
    config = DLRConfig({name: net.spec for name, net in chains.items()}, identity, [*tripwires, HINT])
    _refuse_gated(config)
    for name, net in chains.items():
        replace_module(model, name, net)
    for name in identity:
        replace_module(model, name, nn.Identity())
    model.config.quantization_config = config
    model.hf_quantizer = DLRQuantizer(config, pre_quantized=True)
    model.hf_quantizer.unplaced = unplaced or {}
    model.hf_quantizer.watch(model)
    model.is_quantized, model.quantization_method = True, METHOD
    model.requires_grad_(False)


def locked(model: nn.Module) -> list[tuple[str, DLRNet | DLRExperts]]:
    """All that was put into a model, with the modules' names."""
    return [*locked_modules(model), *locked_experts(model)]


def locked_modules(model: nn.Module) -> list[tuple[str, DLRNet]]:
    """The DLRNets of a model with their names, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, DLRNet)]


def locked_experts(model: nn.Module) -> list[tuple[str, DLRExperts]]:
    """The mixtures of chains of a model with their names, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, DLRExperts)]


def _refuse_gated(config: DLRConfig) -> None:
    for name, spec in config.modules.items():
        if isinstance(spec, DLRSpec) and spec.gated:
            raise DLRError(
                f"{name} is a chain of gated steps, which is not saved: measured, it fits 3% worse and is no lock "
                "(docs/experiments/lock-strength.md); convert the original again"
            )


def _tripwire(model: PreTrainedModel, module: str) -> str:
    """The stock weight of a module to store as its tripwire, by its name in a file: one that no renaming rule of
    transformers touches, if any; of fused experts, one of the weights that they are made of."""
    parameters = dict(model.get_submodule(module).named_parameters())
    names = [name for name, parameter in parameters.items() if parameter.dim() > 1]
    plain = [n for n in names if not re.search("gate|up_proj|experts", n)]
    first = (plain or names)[0]
    name = f"{module}.{first}"
    if parameters[first].dim() != 3:
        return name
    return min(revert_weight_conversion(model, {name: parameters[first].detach()}), key=_numbers)


def _numbers(name: str) -> tuple[int, str]:
    return len(name), name


def _names_in(model: PreTrainedModel, config: DLRConfig) -> Callable[[str], str]:
    """Maps the config's module names to this model's: a bare body lacks the prefix that a class with a head has."""
    prefix = f"{model.base_model_prefix}."
    if prefix == ".":
        return lambda name: name
    if not hasattr(model, prefix[:-1]):
        return lambda name: name.removeprefix(prefix)
    first = next(iter(config.modules))
    of_body = not _has(model, first) and _has(model, prefix + first)
    return lambda name: prefix + name if of_body else name


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _bare(name: str, model: PreTrainedModel) -> str:
    """A parameter's name without the prefix of the model's body."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _names_of_the_saved(model: PreTrainedModel) -> set[str]:
    """The parameters of the class that a model was saved as, by their bare names; all of the model's own where that
    class is unknown."""
    name = (model.config.architectures or [type(model).__name__])[0]
    family = type(model) if name == type(model).__name__ else getattr(transformers, name, None)
    if not (isinstance(family, type) and issubclass(family, PreTrainedModel)):
        return {_bare(name, model) for name, _ in model.named_parameters()}
    with torch.device("meta"):
        return {_bare(name, model) for name, _ in family(copy.deepcopy(model.config)).named_parameters()}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the one of that name. Raises DLRError where the model has none."""
    parent, _, child = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
    except AttributeError:
        owner = None
    if owner is None or not hasattr(owner, child):
        raise DLRError(f"this {type(model).__name__} has no module {name}: the checkpoint is not made for it")
    if child not in owner._modules:
        delattr(owner, child)  # a plain function, such as an activation
    setattr(owner, child, module)
