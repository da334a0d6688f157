"""Adapters as sources: what PEFT saved of a fine-tune, such as LoRA's, merged by PEFT into its base model."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.cache import cache_folder
from ...common.errors import DLRError, first_line
from ...common.files import check_readable, hash_files, read_json
from ...common.hub import model_folder
from ...common.quiet import quiet
from ...common.side_files import licence
from .quantised import unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    if any(path for kind in ("model*.safetensors*", "pytorch_model*") for path in folder.glob(kind)):
        return False
    return (folder / _CONFIG).is_file() and (
        (folder / _WEIGHTS).is_file() or not (folder / "config.json").is_file()
    )


def base_of(folder: Path) -> str:
    """The model that an adapter is for, by path or name on the hub.

    Raises:
        DLRError: Where PEFT is missing, where the adapter names no model, and where that is not to be had.
    """
    check_readable(folder, _CONFIG)
    config = read_json(folder / _CONFIG)
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise DLRError(
            f"{folder} is an adapter that does not say of which model: name that in its {_CONFIG}, as "
            "base_model_name_or_path"
        )
    if find_spec("peft") is None:
        raise DLRError(
            f"{folder} is an adapter of {base}: the package peft merges the two, pip install 'dlr-lock[peft]'"
        )
    elsewhere = f"name what is there in its {_CONFIG}, as base_model_name_or_path"
    if Path(base).expanduser().is_file():
        return base
    try:
        there = model_folder(base, only=["config.json", _CONFIG])
    except DLRError as error:
        raise DLRError(
            f"{folder} is an adapter, and its base model is missing: {error}; {elsewhere}"
        ) from error
    if config.get("revision") and not Path(base).expanduser().is_dir():
        raise DLRError(
            f"{folder} is an adapter of revision {config['revision']} of {base}, which has to be fetched first: "
            f"{elsewhere}"
        )
    if is_adapter(there):
        raise DLRError(f"{folder} is an adapter of {base}, which is an adapter itself: merge that one first")
    return base


def merged(folder: Path, base: Path, of_base: str, load: Callable[[], PreTrainedModel]) -> tuple[Path, str]:
    """A copy of an adapter's base model with the adapter merged into it, in the user's cache, unless it is there
    already. Its weights have the base's dtype, as PEFT leaves them.

    Args:
        folder: The adapter.
        base: Its base model's directory.
        of_base: That one's fingerprint.
        load: Gives the base model.

    Returns:
        The copy, and the fingerprint of adapter and base together.

    Raises:
        DLRError: In a line, where PEFT cannot merge them.
    """
    if not (folder / _WEIGHTS).is_file():
        raise DLRError(
            f"{folder} is an adapter without {_WEIGHTS}; a pickle is never opened: load and save it with PEFT, where "
            "you trust it"
        )
    check_readable(folder, _CONFIG, _WEIGHTS)
    own = hash_files([folder / _CONFIG, folder / _WEIGHTS], named=True)
    fingerprint = hashlib.sha256(f"{own}{of_base}".encode()).hexdigest()
    copy = cache_folder() / "merged" / fingerprint[:24]
    if copy.is_dir():
        return copy, fingerprint
    from peft import PeftModel
    from transformers import AutoTokenizer

    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings(
            "error", message=".*missing adapter keys"
        )  # PEFT would go on with random ones
        model = load()
        try:
            tokenizer = None
            if (folder / "tokenizer_config.json").is_file():
                tokenizer = AutoTokenizer.from_pretrained(
                    str(folder), local_files_only=True, trust_remote_code=False
                )
                if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # as PEFT's own loading does
                    model.resize_token_embeddings(len(tokenizer))
            adapted = PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
            strange = adapted.load_adapter(str(folder), "default", torch_device="cpu").unexpected_keys
            if strange:
                raise ValueError(f"the model has no place for {strange[0]}")
            whole = adapted.merge_and_unload()
        except Exception as error:  # every kind of adapter has requirements of its own
            raise DLRError(
                f"{folder} is an adapter that PEFT cannot merge into {base}: {first_line(error)}"
            ) from error
        with unpacked(folder, copy) as work:
            whole.save_pretrained(work)
            if tokenizer is not None:
                tokenizer.save_pretrained(work)
            if terms := licence(folder) or licence(base):
                lines = "\n".join(f"{key}: {value}" for key, value in terms.items())
                (work / "README.md").write_text(f"---\n{lines}\n---\n", encoding="utf-8")
    return copy, fingerprint
