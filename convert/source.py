"""Source models: a transformers directory, a name on the Hugging Face hub, an adapter, or a GGUF file.

Whatever it was, it ends as a plain directory (config.json and safetensors) that is checked before it is
loaded: transformers would fill missing weights with random numbers and go on.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.errors import DLRError, first_line
from ..common.files import check_readable, hash_files, permission_is_an_error, read_json
from ..common.hub import PICKLES, model_folder
from ..common.quiet import quiet
from ..common.side_files import listed
from ..common.weights import OnDemand, keep_in_memory
from ..reporting.words import bytes_words
from .sources.adapters import base_of, is_adapter, merged
from .sources.checks import check_finite, check_missing
from .sources.gguf import from_gguf
from .sources.quantised import dequantised, refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' words; the rest is kept as float32
_FLOATS = _DTYPES | {"F32": torch.float32, "F64": torch.float64}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class Source:
    """A model to lock.

    Attributes:
        model: In eval mode, requires_grad False.
        tokenizer: None where there is none.
        name: As the caller gave it.
        fingerprint: SHA-256 in hexadecimal of names and bytes of config.json and the weight files; of a GGUF file, of
            its bytes; of an adapter, of its own fingerprint and its base's.
        path: The plain directory that it was loaded from.
        dtype: Of the weights in that directory.
        content: Like `fingerprint`, of that directory: what it was when the model was loaded.
        unplaced: Tensors in its files that the model's class has no place for, such as further heads.
        weights: Where the model's weights are in memory as they are used; None where all of them are, always.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    fingerprint: str
    path: Path
    dtype: torch.dtype
    content: str
    unplaced: frozenset[str]
    weights: OnDemand | None = None

    def check_unchanged(self) -> None:
        """Raises DLRError where the directory is no longer what the model was loaded from."""
        with permission_is_an_error():
            if _fingerprint(self.path) != self.content:
                raise DLRError(
                    f"{self.path} has changed since this run began to read it: put its files back and run again"
                )


@permission_is_an_error()
def open_source(
    source: str | Path,
    *,
    dtype: torch.dtype | str,
    device: torch.device | str,
    gguf_dir: Path | None = None,
    room: int | None = None,
) -> Source:
    """Checks and loads a source model.

    Args:
        source: A transformers directory, a hub id, an adapter's directory or id, or a .gguf file.
        dtype: Of the weights in memory; "auto" is the checkpoint's own.
        device: Where they lie.
        gguf_dir: The folder that gets the dequantised copy of a GGUF file, in a folder of its own, and is looked into
            for one made before; a cache folder of the user's where it is None.
        room: Bytes for weights in memory; a model that is larger has those of a layer while it runs. None for all.

    Raises:
        DLRError: In one line, on everything that is wrong with the source.
    """
    folder, words, fingerprint = _plain(source, dtype, gguf_dir)
    content = _fingerprint(folder)
    stored, weights = _dtype(folder), None
    with quiet():
        if room is None or _bytes(folder, dtype) <= room:
            model, unplaced = _load(folder, dtype)
            model = model.to(device)
            keep_in_memory(model)
        else:
            model, unplaced = _load(folder, stored)
            weights = _on_demand(model, folder, stored, dtype, torch.device(device), room)
        model = model.eval().requires_grad_(False)
        tokenizer = load_tokenizer(words)
    check_finite(model, folder, weights)
    return Source(
        model, tokenizer, str(source), fingerprint or content, folder, stored, content, unplaced, weights
    )


def _plain(
    source: str | Path, dtype: torch.dtype | str, gguf_dir: Path | None
) -> tuple[Path, Path, str | None]:
    """A source's directory of plain weights, its tokenizer's, and its fingerprint where that is not of the former."""
    given, fingerprint, words = Path(source).expanduser(), None, None
    if given.is_file():
        if given.suffix.lower() != ".gguf":
            raise DLRError(f"{source} is a file, but neither a model's directory nor a .gguf file")
        fingerprint = hash_files([given])
        folder = from_gguf(given, fingerprint, dtype, gguf_dir)
    else:
        files = " or .gguf file"
        folder = model_folder(source, only=["config.json", "adapter_config.json"], files=files)
        if not (folder / "adapter_config.json").is_file():
            check_config(folder)
        folder = model_folder(source, files=files)
        if is_adapter(folder):
            base, words, of_base = _plain(base_of(folder), "auto", gguf_dir)
            folder, fingerprint = merged(
                folder, base, of_base or _fingerprint(base), lambda: _load(base, "auto")[0]
            )
            words = folder if has_words(folder) else words
    check_readable(folder, "config.json", "*.safetensors", "*.index.json")
    check_config(folder)
    words = words or folder
    if quantization := read_json(folder / "config.json").get("quantization_config"):
        fingerprint = _fingerprint(folder)
        with quiet():
            folder = dequantised(folder, quantization, dtype)
    return folder, words, fingerprint


def _bytes(folder: Path, dtype: torch.dtype | str) -> int:
    """Of the weights in memory, where they are of a dtype; "auto" is the files' own."""
    itemsize = (dtype if isinstance(dtype, torch.dtype) else _dtype(folder)).itemsize
    return itemsize * sum(math.prod(part.get_shape()) for _, part in stored_parts(folder))


def _on_demand(
    model: PreTrainedModel,
    folder: Path,
    stored: torch.dtype,
    dtype: torch.dtype | str,
    device: torch.device,
    room: int,
) -> OnDemand:
    """A model of mapped files becomes one whose weights come and go. What the files hold in another dtype than most
    keeps its own numbers."""
    asked = dtype if isinstance(dtype, torch.dtype) else stored
    prefix = f"{model.base_model_prefix}."
    own = dict([*model.named_parameters(), *model.named_buffers()])
    exact: dict[str, Tensor] = {}
    for name, part in stored_parts(folder):
        if part.get_dtype() in _FLOATS and _FLOATS[part.get_dtype()] != stored:
            forms = [form for form in (name, prefix + name, name.removeprefix(prefix)) if form in own]
            if forms:
                exact[forms[0]] = part[...] if asked.itemsize > 2 else part[...].to(asked)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.dtype = asked
    return OnDemand(model, stored=stored, dtype=asked, device=device, room=room, exact=exact)


def stored_parts(folder: Path) -> Iterator[tuple[str, Any]]:
    """Every tensor of a model's files by name, as safetensors' slice of it: its shape and dtype are there unread."""
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_slice(name)


def _fingerprint(folder: Path) -> str:
    files = [folder / "config.json", *weight_files(folder)]
    return hash_files(sorted(files, key=lambda path: path.name), named=True)


def check_config(folder: Path) -> None:
    """Raises DLRError where a model's directory, by its config.json alone, cannot be locked."""
    from transformers import CONFIG_MAPPING

    if not any(folder.iterdir()):
        raise DLRError(f"{folder} is empty: give a directory with config.json and safetensors weights")
    file = folder / "config.json"
    if not file.is_file():
        raise DLRError(f"{folder} has no config.json: give a directory that save_pretrained wrote")
    if (folder / "adapter_config.json").is_file():
        raise DLRError(
            f"{folder} holds an adapter (adapter_config.json) beside a model: merge it into the model or move it away"
        )
    config = read_json(file)
    quantization = config.get("quantization_config")
    if quantization:
        if isinstance(quantization, dict) and quantization.get("quant_method") == "dlr":
            raise DLRError(f"{folder} is already locked: give the original model")
        if why := refused(folder, quantization):
            raise DLRError(why)
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        code = "; it brings code of its own, which is never run" if "auto_map" in config else ""
        raise DLRError(f"{folder}: model_type {kind!r} is unknown to the installed transformers{code}")


def weight_files(folder: Path, *, mapped: bool = True) -> list[Path]:
    """The safetensors files that make up the model, each found whole.

    Args:
        folder: The model's directory.
        mapped: Whether this machine is to map them, and has to be able to; if not, they are found and not opened.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise DLRError(f"{index} has no weight_map: fetch the model again")
        # Only names in this folder: an index must not lead elsewhere.
        files = [folder / Path(str(name)).name for name in sorted({str(name) for name in shards.values()})]
    else:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickled:
            raise DLRError(
                f"{folder} has its weights as a pickle only ({pickled[0]}), which is never opened: "
                "convert it to safetensors, where you trust it: AutoModelForCausalLM.from_pretrained(...)"
                ".save_pretrained(...)"
            )
        raise DLRError(f"{folder} has no weights: model.safetensors, or shards with their index, is needed")
    for file in files:
        if not file.is_file():
            raise DLRError(f"{file} is missing: fetch the model again")
        if not mapped:
            continue
        try:
            with safe_open(file, framework="pt"):
                pass  # reads the header and holds it against the file's size
        except (SafetensorError, OSError, RuntimeError) as error:
            if "Cannot allocate memory" in str(
                error
            ):  # a whole file is mapped, which the system counts as memory
                raise DLRError(
                    f"{file} has {bytes_words(file.stat().st_size)}, more than this machine can map at once: write the "
                    "model in shards on a larger one, save_pretrained(..., max_shard_size='4GB')"
                ) from error
            raise DLRError(
                f"{file} is truncated or damaged ({first_line(error)}): fetch the model again"
            ) from error
    return files


def weight_header(file: Path) -> dict[str, dict[str, Any]]:
    """dtype, shape and data_offsets of a safetensors file's tensors by name, read without mapping the file.

    Raises:
        DLRError: Where the file is not as long as its header says, or has none.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            parts = json.loads(opened.read(length)) if length <= size else {}
            parts.pop("__metadata__", None)
            whole = size == 8 + length + max(part["data_offsets"][1] for part in parts.values())
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
    if not whole:
        raise DLRError(
            f"{file} is truncated or damaged (not the length that its header says): fetch the model again"
        )
    return parts


def _dtype(folder: Path) -> torch.dtype:
    """The dtype of most of the floating weights' numbers."""
    numbers: Counter[torch.dtype] = Counter()
    for _, part in stored_parts(folder):
        numbers[_DTYPES.get(part.get_dtype(), torch.float32)] += math.prod(part.get_shape())
    return numbers.most_common(1)[0][0]


def public_name(source: str) -> str:
    """A source's name as it may be published: of a local path only the last part."""
    path = Path(source).expanduser().resolve()
    repository = path.parents[1].name if len(path.parts) > 2 else ""
    if path.parent.name == "snapshots" and repository.startswith("models--"):  # the hub's cache
        return repository.removeprefix("models--").replace("--", "/")
    return path.name if path.exists() else source


def compute_dtype(device: torch.device) -> torch.dtype | str:
    """What to load a model's weights as, to compute on a device: 16-bit products are several times slower than
    float32 on most CPUs; elsewhere the checkpoint's own."""
    return torch.float32 if device.type == "cpu" else "auto"


def _load(folder: Path, dtype: torch.dtype | str) -> tuple[PreTrainedModel, frozenset[str]]:
    """The model, and the names of tensors that it has no place for."""
    import transformers

    config = read_json(folder / "config.json")
    architectures = config.get("architectures") or [""]
    family: Any = getattr(transformers, str(architectures[0]), None)
    if not (isinstance(family, type) and issubclass(family, transformers.PreTrainedModel)):
        family = transformers.AutoModelForCausalLM
    try:
        # dtype= and never .to(dtype), which would round the rotary frequencies too.
        model, info = family.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_missing refuses them, and names the tensor
        )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        # Fields of the wrong type, sizes that differ: every architecture fails in its own way.
        raise DLRError(f"{folder} cannot be loaded: {first_line(error)}") from error
    check_missing(info, folder)
    return model, _unplaced(model, set(info.get("unexpected_keys") or ()), folder)


def _unplaced(model: PreTrainedModel, unexpected: set[str], folder: Path) -> frozenset[str]:
    """Those that transformers reports, with or without the body's prefix, and whole modules that the class is told to
    pass over without a word (layers that predict further tokens), but no buffers of earlier versions."""
    prefix = f"{model.base_model_prefix}."
    modules = {name for name, _ in model.named_modules()}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    found = set()
    for name, _ in stored_parts(folder):
        forms = {name, prefix + name, name.removeprefix(prefix)}
        passed_over = any(pattern.search(name) for pattern in ignored)
        if forms & unexpected or (passed_over and not modules & {form.rpartition(".")[0] for form in forms}):
            found.add(name)
    return frozenset(found)


def unplaced_tensors(source: Source, locked: Iterable[str]) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a source that its class has no place for, such as further heads, by their names in its files.

    All are left behind where one has the shape of a locked matrix: a copy of the MLPs beside the model (an average
    over training, a draft model's layer) would undo the lock.

    Args:
        source: The model.
        locked: The names of its modules that chains replace.

    Returns:
        The tensors, and a sentence where they were left behind.
    """
    tensors: dict[str, Tensor] = {
        name: part[...] for name, part in stored_parts(source.path) if name in source.unplaced
    }
    parameters = (p for name in locked for p in source.model.get_submodule(name).parameters())
    matrices = {shape for parameter in parameters if parameter.dim() > 1 for shape in _matrices_in(parameter)}
    if any(tuple(sorted(tensor.shape)) in matrices for tensor in tensors.values()):
        return {}, (
            f"left behind, for a {type(source.model).__name__} has no place for them and some have the shape of the "
            f"MLPs' matrices: tensors {listed(sorted(tensors))}"
        )
    return tensors, None


def _matrices_in(parameter: Tensor) -> Iterator[tuple[int, ...]]:
    """Its shape, sorted; of fused experts also that of one expert's matrix and of the halves, gate and up, of it."""
    yield tuple(sorted(parameter.shape))
    if parameter.dim() == 3:
        _, a, b = parameter.shape
        yield from (tuple(sorted(shape)) for shape in ((a, b), (a // 2, b), (a, b // 2)))


def has_words(folder: Path) -> bool:
    """Whether there is a tokenizer in a model's directory."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model's directory, None where there is none; raises DLRError where it is damaged."""
    from transformers import AutoTokenizer

    check_readable(folder, *_TOKENIZER_FILES)
    if not has_words(folder):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise DLRError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error
