"""The model that is planned for, without its weights: its classes on the meta device, and its files' headers."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..common.errors import DLRError, first_line
from ..common.files import check_readable, permission_is_an_error, read_json
from ..common.hooks import frozen, removed, text_inputs
from ..common.hub import HUB_NAME, model_folder
from ..common.quiet import quiet
from ..convert.config import ConversionConfig
from ..convert.experts.routing import passed_over
from ..convert.mlp_discovery import (
    check_dense,
    check_used_once,
    mixtures_in,
    named_by,
    numbered,
    stand_ins,
)
from ..convert.mlp_matching import (
    ACT_NAME,
    MLP,
    is_act,
    is_linear,
    layer_number,
    mixtures,
    module_names,
    shape_of,
    sizes_of,
    trial_tokens,
    within,
)
from ..convert.outlook.subject import Subject
from ..convert.source import check_config, compute_dtype, weight_files, weight_header
from ..convert.sources.adapters import base_of, is_adapter
from ..convert.sources.gguf import config_of
from ..convert.sources.quantised import plain_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_CONFIGS = ["config.json", "adapter_config.json"]
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


@permission_is_an_error()
def open_subject(source: str | Path, config: ConversionConfig, *, here: bool = True) -> Subject:
    """The model of that name, of which config.json and the headers of the weight files are read and nothing else.

    Args:
        source: A transformers directory, a hub id or a .gguf file; of an adapter's, the base model is read.
        config: Which layers, and which modules are MLPs.
        here: Whether it is this machine that would map the weight files.

    Raises:
        DLRError: In one line, on all that a conversion would refuse by the config alone.
    """
    origin, copies = source, 0  # copies of the whole model that are made before all else
    if not Path(source).expanduser().is_file() and is_adapter(folder := model_folder(source, only=_CONFIGS)):
        origin, copies = base_of(folder), 1
    file = Path(origin).expanduser()
    unpacked = file.is_file()
    if unpacked:
        if file.suffix.lower() != ".gguf":
            raise DLRError(f"{origin} is a file, but neither a model's directory nor a .gguf file")
        own = config_of(file)
    else:
        own = _config(folder := model_folder(origin, only=_CONFIGS))
        unpacked = bool(read_json(folder / "config.json").get("quantization_config"))
    with quiet():
        model = _skeleton(own, origin)
    every = reached(model, mlps_by_shape(model, config.mlps))
    if not every:
        raise DLRError(
            "no MLP is recognised by its shape: name the modules by a pattern such as --mlps 'layers\\.\\d+\\.ffn$'"
        )
    check_dense(model, every, layers=config.layers, pattern=config.mlps)
    if file.is_file():
        dtype, files = (
            torch.float32,
            file.stat().st_size,
        )  # as transformers unpacks it where no dtype is asked for
    else:
        dtype, files = _headers(folder, origin, here)
        if unpacked:
            dtype = plain_dtype("auto" if copies else compute_dtype(torch.device(str(config.device))))
    copied = (copies + unpacked) * sum(p.numel() for p in model.parameters()) * dtype.itemsize
    return Subject(str(source), model, stand_ins(every, config.layers), every, dtype, files, copied)


def _config(folder: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    check_readable(folder, "config.json")
    check_config(folder)
    with quiet():
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            # Fields of the wrong type or size: every architecture fails in its own way.
            raise DLRError(f"{folder / 'config.json'} makes no model: {first_line(error)}") from error


def _skeleton(config: PreTrainedConfig, origin: str | Path) -> PreTrainedModel:
    import transformers

    family: Any = getattr(transformers, str((config.architectures or [""])[0]), None)
    try:
        with torch.device("meta"):
            if isinstance(family, type) and issubclass(family, transformers.PreTrainedModel):
                model = family(config)
            else:
                model = transformers.AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    except Exception as error:  # as above
        raise DLRError(f"the config of {origin} makes no model: {first_line(error)}") from error
    return model.eval()


def mlps_by_shape(model: PreTrainedModel, pattern: str | None = None) -> list[MLP]:
    """What `find_mlps` will find, by shapes alone: nothing is run, so that a model on the meta device will do.

    Args:
        model: Any transformers model.
        pattern: A regular expression of module names, as for `find_mlps`.
    """
    names = [name for name in module_names(model) if layer_number(model, name) is not None]
    found: list[tuple[str, tuple[str, ...]]] = []
    if pattern is not None:
        wanted = named_by(pattern)
        for name in (n for n in names if not any(within(mixture, [n]) for mixture in mixtures(model))):
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
    dense = [_mlp(model, name, rest) for name, rest in found]
    return numbered(model, [*dense, *mixtures_in(model, pattern)])


def reached(model: PreTrainedModel, mlps: list[MLP]) -> list[MLP]:
    """Those of a model's MLPs that a pass over text calls, as a pass on the meta device tells. All of them where its
    code looks at numbers on the way, as GPT-2's does: then that is not known.

    Raises:
        DLRError: Where the model takes no text, and where an MLP is called more than once.
    """
    ids = trial_tokens(model)
    calls = dict.fromkeys((mlp.module for mlp in mlps), 0)

    def count(name: str) -> Any:
        return lambda module, args: calls.update({name: calls[name] + 1})

    hooks = [model.get_submodule(name).register_forward_pre_hook(count(name)) for name in calls]
    with removed(hooks), frozen(model), passed_over(model):
        try:
            model(**text_inputs(model, ids))
        except Exception:  # of the many kinds that tensors without numbers raise
            return mlps
    check_used_once(mlps, calls)
    return [mlp for mlp in mlps if calls[mlp.module]]


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


def _mlp(model: nn.Module, name: str, identity: tuple[str, ...]) -> MLP:
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
    return MLP(-1, name, identity, d, f, gated, "unknown", params, None, None, None)


def _headers(folder: Path, source: str | Path, here: bool) -> tuple[torch.dtype, int]:
    """The dtype of most of the weight files' numbers, and the bytes of all of them."""
    numbers: Counter[str] = Counter()
    if Path(source).expanduser().is_dir():
        files = weight_files(folder, mapped=here)
        for part in (part for file in files for part in weight_header(file).values()):
            numbers[part["dtype"]] += math.prod(part["shape"])
        size = sum(file.stat().st_size for file in files)
    else:
        numbers, size = _hub_headers(str(source))
    if not numbers:
        raise DLRError(f"{source} has no weights in safetensors")
    return _DTYPES.get(numbers.most_common(1)[0][0], torch.float32), size


def _hub_headers(name: str) -> tuple[Counter[str], int]:
    """How many numbers of each dtype a repository's weight files hold, and their bytes: the files' headers alone are
    fetched."""
    from huggingface_hub import get_safetensors_metadata

    assert HUB_NAME.fullmatch(name)
    try:
        found = get_safetensors_metadata(name)
    except Exception as error:  # no network, no safetensors, gated: unrelated classes
        raise DLRError(f"the weight files' headers of {name} cannot be had: {first_line(error)}") from error
    size = sum(
        tensor.data_offsets[1] - tensor.data_offsets[0]
        for file in found.files_metadata.values()
        for tensor in file.tensors.values()
    )
    return Counter({str(kind): count for kind, count in found.parameter_count.items()}), size
