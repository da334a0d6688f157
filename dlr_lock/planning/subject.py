"""The model that is planned for, without its weights: its classes on the meta device, and its files' headers."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..common.errors import DLRError, first_line
from ..common.files import check_readable, permission_is_an_error
from ..common.hooks import is_paired
from ..common.hub import HUB_NAME, model_folder
from ..common.quiet import quiet
from ..convert.config import ConversionConfig
from ..convert.mlp_discovery import check_dense, select_layers
from ..convert.mlp_matching import (
    ACT_NAME,
    MLP,
    has_experts,
    is_act,
    is_linear,
    layer_number,
    module_names,
    shape_of,
    sizes_of,
    within,
)
from ..convert.source import check_config, stored_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "U8": 1}
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """A model to plan for.

    Attributes:
        name: As the caller gave it.
        model: Its class on the meta device: shapes, no numbers.
        mlps: The MLPs that would be converted, in model order.
        every: How many MLPs there are.
        dtype: Of most of the files' numbers.
        disk: Bytes of the weight files.
    """

    name: str
    model: PreTrainedModel
    mlps: list[MLP]
    every: int
    dtype: torch.dtype
    disk: int

    @property
    def params(self) -> int:
        """Parameters of the model; tied ones count once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of the list that holds the first MLP."""
        owner = self.mlps[0].module.split(".")
        for end in range(1, len(owner)):
            part = self.model.get_submodule(".".join(owner[:end]))
            if isinstance(part, nn.ModuleList):
                return list(part)
        return [self.model]

    @property
    def body_matrices(self) -> int:
        """Numbers in the matrices that every token meets on its way through all layers."""
        return sum(matrices_of(layer) for layer in self.layers)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.model.get_input_embeddings().weight.shape[0]


@permission_is_an_error()
def open_subject(source: str | Path, config: ConversionConfig) -> Subject:
    """The model of that name, of which config.json and the headers of the weight files are read and nothing else.

    Args:
        source: A transformers directory or a hub id. A .gguf file has to be unpacked first, by a conversion.
        config: Which layers, and which modules are MLPs.

    Raises:
        DLRError: In one line, on all that a conversion would refuse by the config alone.
    """
    if Path(source).expanduser().is_file():
        raise DLRError(f"{source} is a file: a plan is made of a model's directory or its name on the hub")
    folder = model_folder(source, only=["config.json", "adapter_config.json"])
    check_readable(folder, "config.json")
    check_config(folder)
    with quiet():
        model = _skeleton(folder)
    every = mlps_by_shape(model, config.mlps)
    if not every:
        raise DLRError(
            "no MLP is recognised by its shape: name the modules by a pattern such as --mlps 'layers\\.\\d+\\.ffn$'"
        )
    check_dense(model, every, layers=config.layers, pattern=config.mlps)
    dtype, disk = _headers(folder, source)
    return Subject(str(source), model, select_layers(every, config.layers), len(every), dtype, disk)


def _skeleton(folder: Path) -> PreTrainedModel:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        family: Any = getattr(transformers, str((config.architectures or [""])[0]), None)
        with torch.device("meta"):
            if isinstance(family, type) and issubclass(family, transformers.PreTrainedModel):
                model = family(config)
            else:
                model = transformers.AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    except Exception as error:
        # Fields of the wrong type or size: every architecture fails in its own way.
        raise DLRError(f"{folder / 'config.json'} makes no model: {first_line(error)}") from error
    kind = (
        "an encoder-decoder" if is_paired(model) else "a mixture of experts" if has_experts(model) else None
    )
    if kind:
        raise DLRError(f"{folder} is {kind}: convert locks it, but what that takes is not reckoned yet")
    return model.eval()


def mlps_by_shape(model: nn.Module, pattern: str | None = None) -> list[MLP]:
    """What `find_mlps` will find, by shapes alone: nothing is run, so that a model on the meta device will do.

    Args:
        model: Any transformers model.
        pattern: A regular expression of module names, as for `find_mlps`.
    """
    names = [name for name in module_names(model) if layer_number(model, name) is not None]
    found: list[tuple[str, tuple[str, ...]]] = []
    if pattern is not None:
        try:
            wanted = re.compile(pattern)
        except re.error as error:
            raise DLRError(f"--mlps {pattern!r} is not a regular expression: {error}") from error
        for name in names:
            here = model.get_submodule(name)
            inside = within(name, [taken for taken, _ in found])
            if wanted.search(name) and not inside and any(p.dim() > 1 for p in here.parameters()):
                found.append((name, ()))
    else:
        found = [(name, ()) for name in names if _is_wide(model, name)]
        taken = [name for name, _ in found]
        free = [name for name in names if not within(name, taken)]
        for layer in dict.fromkeys(re.match(r".*?\.\d+\.|", name)[0] for name in free):  # type: ignore[index]
            if loose := _loose(model, [name for name in free if name.startswith(layer)]):
                found.append((loose[0], loose[1:]))
    order = {name: at for at, (name, _) in enumerate(model.named_modules())}
    found.sort(key=lambda one: order[one[0]])
    numbers = [layer_number(model, name) for name, _ in found]
    if len(set(numbers)) < len(numbers):
        numbers = list(range(len(found)))
    return [_mlp(model, name, rest, int(n or 0)) for (name, rest), n in zip(found, numbers, strict=True)]


def _is_wide(model: nn.Module, name: str) -> bool:
    """Whether a module has an MLP's shape; three square maps, as attention has them, are none."""
    shape = shape_of(model, name)
    if shape is None:
        return False
    f, d = sizes_of(model.get_submodule(shape[1]))
    return f > d


def _loose(model: nn.Module, names: list[str]) -> tuple[str, str, str] | None:
    """First map, activation and second map of an MLP that is strewn over a layer of these modules."""
    parts = {name: model.get_submodule(name) for name in names}
    acts = [name for name, part in parts.items() if is_act(part) or ACT_NAME.search(name)]
    sizes = {name: sizes_of(part) for name, part in parts.items() if is_linear(part)}
    pairs = [
        (up, down) for up, (d, f) in sizes.items() for down, size in sizes.items() if f > d and size == (f, d)
    ]
    return (pairs[0][0], acts[0], pairs[0][1]) if len(pairs) == len(acts) == 1 else None


def _mlp(model: nn.Module, name: str, identity: tuple[str, ...], layer: int) -> MLP:
    parts = [model.get_submodule(part) for part in (name, *identity)]
    params = sum(p.numel() for part in parts for p in part.parameters())
    if identity:
        d, f = sizes_of(parts[0])
        gated = False
    elif shape := shape_of(model, name):
        f, d = sizes_of(model.get_submodule(shape[1]))
        gated = len(shape[0]) == 2 or sizes_of(model.get_submodule(shape[0][0]))[1] == 2 * f
    else:  # taken whole by its name: [.., d] to [.., d]
        d = min(side for p in parts[0].parameters() if p.dim() > 1 for side in p.shape)
        f, gated = max(1, params // (2 * d)), False
    return MLP(layer, name, identity, d, f, gated, "unknown", params, None, None, None)


def matrices_of(module: nn.Module) -> int:
    """Numbers in a module's matrices."""
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


def _headers(folder: Path, source: str | Path) -> tuple[torch.dtype, int]:
    """The dtype of most of the weight files' numbers, and the bytes of all of them."""
    numbers: Counter[str] = Counter()
    if Path(source).expanduser().is_dir():
        for _, part in stored_parts(folder):
            numbers[part.get_dtype()] += math.prod(part.get_shape())
    else:
        numbers.update(_hub_headers(str(source)))
    if not numbers:
        raise DLRError(f"{source} has no weights in safetensors")
    most = numbers.most_common(1)[0][0]
    size = sum(_BYTES.get(kind, 4) * count for kind, count in numbers.items())
    return _DTYPES.get(most, torch.float32), size


def _hub_headers(name: str) -> dict[str, int]:
    """How many numbers of each dtype a repository's weight files hold: their first bytes alone are fetched."""
    from huggingface_hub import get_safetensors_metadata

    assert HUB_NAME.fullmatch(name)
    try:
        return {str(kind): count for kind, count in get_safetensors_metadata(name).parameter_count.items()}
    except Exception as error:  # no network, no safetensors, gated: unrelated classes
        raise DLRError(f"the weight files' headers of {name} cannot be had: {first_line(error)}") from error
