"""A locked checkpoint on disk: writing, loading, describing and checking it."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dlr_lock_autoload import METHOD

from ..common.errors import DLRError, first_line
from ..common.files import MANIFEST, check_readable, hash_files, permission_is_an_error, read_json
from ..common.hub import model_folder
from ..common.version import __version__
from .config import DLRConfig
from .device import usable_device
from .quantizer import locked

MANIFEST_FORMAT = 1
_WORDS = ["config.json", MANIFEST]  # all that a repository is asked for before its weights are


@permission_is_an_error()
def load(
    path: str | Path, *, dtype: torch.dtype | str = "auto", device: torch.device | str | None = None
) -> PreTrainedModel:
    """A locked checkpoint as a transformers model in eval mode, its MLPs DLRNets, ready to serve.

    On a CPU the weights stay in the mapped files until they are read, so that loading takes no second copy of them.

    Args:
        path: The checkpoint's directory, or its name on the Hugging Face hub.
        dtype: Of the weights in memory; 'auto' for the checkpoint's own.
        device: Where they lie; None for the best there is.

    Raises:
        DLRError: Where the directory is no locked checkpoint, is of a newer format, or lacks its config, a file of its
            weights or part of one. Its other files may have been edited since; `verify` names them.
    """
    place = usable_device(device)
    read_config(model_folder(path, only=_WORDS))
    folder = model_folder(path)
    check_readable(folder, "config.json", "*.safetensors", "*.index.json")
    if (folder / MANIFEST).is_file():
        files = _read_manifest(folder)["files"]
        needed = {name: files[name] for name in files if name == "config.json" or _is_weights(name)}
        _raise_for(_size_faults(folder, needed))
    try:
        config = AutoConfig.from_pretrained(folder)
        model_class = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
        model = model_class.from_pretrained(folder, dtype=dtype)
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        hint = "; dlr-lock verify names a bad file" if (folder / MANIFEST).is_file() else ""
        raise DLRError(f"{folder} does not load: {first_line(error)}{hint}") from error
    if not locked(model):
        raise DLRError(f"{folder} holds no DLR-Net")
    if model.device != place:  # a move makes the Gram blocks anew
        model.to(place)
    return model.eval()


def read_config(folder: Path) -> DLRConfig:
    """The lock's description in config.json.

    Raises:
        DLRError: Where there is none or it cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise DLRError(f"{folder} has no config.json: it is not a checkpoint")
    config = read_json(folder / "config.json")
    if not is_locked(folder):
        raise DLRError(f"{folder} is not a locked checkpoint")
    try:
        return DLRConfig(**config["quantization_config"])
    except (TypeError, AttributeError) as error:
        raise DLRError(f"{folder}'s quantization_config cannot be read: {error}") from error


def is_locked(folder: Path) -> bool:
    """Whether a directory's config.json names our method, whatever else is wrong with it."""
    try:
        config = read_json(folder / "config.json")
    except DLRError:
        return False
    lock = config.get("quantization_config")
    return isinstance(lock, dict) and lock.get("quant_method") == METHOD


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Writes dlr_manifest.json: size and SHA-256 of every file in `folder`, and `facts` about the conversion."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": hash_files([path])}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    program = f"dlr-lock {__version__}"
    manifest = {"format": MANIFEST_FORMAT, "program": program, **facts, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@permission_is_an_error()
def inspect(path: str | Path) -> dict[str, Any]:
    """What a locked checkpoint says of itself: the manifest's facts and the spec of each module."""
    folder = model_folder(path, only=_WORDS)
    lock = read_config(folder)
    manifest = _read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    return {"path": str(path), **manifest, "lock": lock.to_dict()}


@permission_is_an_error()
def verify(path: str | Path) -> list[str]:
    """Compares every file with the manifest.

    Returns:
        One line a fault, each naming its file; none if all is well.

    Raises:
        DLRError: Where the directory is no locked checkpoint or has no manifest.
    """
    folder = model_folder(path)
    if not (folder / MANIFEST).is_file():
        raise DLRError(f"{folder} has no {MANIFEST}, so there is nothing to verify it against")
    files = _read_manifest(folder)["files"]
    faults = _size_faults(folder, files)
    faulty = {fault.split(":")[0] for fault in faults}
    for name, entry in files.items():
        if name not in faulty and hash_files([folder / name]) != entry["sha256"]:
            faults.append(f"{name}: its content was altered")
    for path_ in sorted(folder.rglob("*.safetensors")):
        if str(path_.relative_to(folder)) not in files:
            faults.append(f"{path_.relative_to(folder)}: not in the manifest")
    return faults


def _is_weights(name: str) -> bool:
    """Whether a file, by its path in the checkpoint, is read for the model's weights."""
    return "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))


def _size_faults(folder: Path, files: dict[str, Any]) -> list[str]:
    faults = []
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name}: missing")
        elif path.stat().st_size != entry["size"]:
            faults.append(f"{name}: {path.stat().st_size} bytes, the manifest says {entry['size']}")
    return faults


def _raise_for(faults: list[str]) -> None:
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise DLRError(f"bad checkpoint file {faults[0]}{more}; fetch the checkpoint again")


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest.get("format"), int) or manifest["format"] > MANIFEST_FORMAT:
        raise DLRError(
            f"{folder / MANIFEST} has format {manifest.get('format')}, "
            f"this dlr-lock reads up to {MANIFEST_FORMAT}: upgrade dlr-lock"
        )
    files = manifest.get("files")
    files = files if isinstance(files, dict) else {"": None}
    sound = all(
        isinstance(e, dict) and isinstance(e.get("size"), int) and isinstance(e.get("sha256"), str)
        for e in files.values()
    )
    if not sound or "config.json" not in files or not any(_is_weights(name) for name in files):
        raise DLRError(f"{folder / MANIFEST} does not list the checkpoint's files: it is damaged")
    outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise DLRError(f"{folder / MANIFEST} names a file outside the checkpoint: {outside[0]}")
    return manifest
