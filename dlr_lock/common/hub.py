"""Models by name: a folder here, or the local copy of a repository on the Hugging Face hub."""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import DLRError, first_line
from .files import read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
OTHER_WEIGHTS = (
    ".gguf", ".ggml", ".llamafile", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot", ".tflite", ".litertlm", ".task",
    ".mlmodel", ".mlpackage", ".nemo", ".engine", ".pte",
)  # fmt: skip
# Hugging Face's own rule for a repository's name: an owner at most, no other slash.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def model_folder(name: str | Path, *, only: Sequence[str] | None = None, files: str = "") -> Path:
    """The folder of that name, or the local copy of the hub's repository, fetched where it is not in the cache.

    Nothing pickled is fetched, no other format than safetensors, and weights in subfolders only where modules.json
    (of a sentence encoder) names them.

    Args:
        name: A path or a name on the hub.
        only: Patterns of the files that are wanted of a repository, None for all that a model needs.
        files: What else could have been given, for the message.

    Raises:
        DLRError: Where there is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    missing = f"{name} is not a directory{files} here, nor"
    if not HUB_NAME.fullmatch(str(name)):
        raise DLRError(f"{missing} a name on the Hugging Face hub: check the path")
    from huggingface_hub import snapshot_download

    formats = [f"*{suffix}" for suffix in (*PICKLES, *OTHER_WEIGHTS)]
    try:
        # Large weights take minutes: the hub's own progress bar stays on.
        if only is not None:
            return Path(snapshot_download(str(name), allow_patterns=list(only)))
        ignored = [*formats, "*/*.safetensors", "consolidated*", "original/*"]
        copy = Path(snapshot_download(str(name), ignore_patterns=ignored))
        if weights := [f"{part}/*.safetensors" for part in encoder_parts(copy)]:
            snapshot_download(str(name), allow_patterns=weights, revision=copy.name)
        return copy
    except Exception as error:
        # Not found, gated, no network, proxies: a dozen unrelated classes of httpx, requests and the hub.
        raise DLRError(
            f"{missing} a model to be had from the Hugging Face hub ({first_line(error)})"
        ) from error


def encoder_parts(folder: Path) -> list[str]:
    """The subfolders that a sentence encoder's modules.json names (pooling, dense layers), but for those with a model
    of transformers in them; none where there is no such file."""
    parts, found = [], []
    with suppress(DLRError):
        parts = read_json(folder / "modules.json", list)
    for path in (str(part.get("path") or "").strip("/") for part in parts if isinstance(part, dict)):
        config: dict[str, Any] = {}
        with suppress(DLRError):
            config = read_json(folder / path / "config.json")
        if path and ".." not in Path(path).parts and "model_type" not in config:
            found.append(path)
    return found
