"""Quantised sources that transformers can dequantise without a GPU: fp8 in blocks and mxfp4, as gpt-oss comes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ...common.cache import cache_folder
from ...common.errors import DLRError, first_line
from ...common.files import hash_files, whole_directory
from .checks import check_missing

METHODS = {
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
}  # and the classes that can dequantise on loading


def refused(folder: Path, quantization: Any) -> str | None:
    """Why a model with such a `quantization_config` cannot be converted, and what to do; None where it can."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method in METHODS:
        return None
    return (
        f"{folder} is quantised ({method or 'unknown method'}), which is not undone here "
        f"({' and '.join(METHODS)} are): give the original, or load it with its own "
        "library, model.dequantize(), model.save_pretrained(...)"
    )


def plain_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Of the plain copy's weights; "auto" is bfloat16."""
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def dequantised(
    folder: Path,
    quantization: dict[str, Any],
    dtype: torch.dtype | str,
) -> Path:
    """A copy of a quantised model with plain weights, in the user's cache, unless it is there already.

    Args:
        folder: The model.
        quantization: Its `quantization_config`, of a method of METHODS.
        dtype: Of the copy's weights; "auto" is bfloat16.

    Raises:
        DLRError: In a line, where it cannot be read or written.
    """
    import transformers

    kind = plain_dtype(dtype)
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")], key=lambda path: path.name)
    fingerprint = hash_files(files, named=True)
    copy = cache_folder() / "dequantised" / f"{fingerprint[:24]}-{str(kind).removeprefix('torch.')}"
    if copy.is_dir():
        return copy
    method = quantization["quant_method"]
    choices = {
        name: value for name, value in quantization.items() if name not in ("quant_method", "dequantize")
    }
    family: Any = transformers.AutoModelForCausalLM
    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        family = named
    try:
        model, info = family.from_pretrained(
            str(folder),
            quantization_config=getattr(transformers, METHODS[method])(**choices, dequantize=True),
            dtype=kind,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # every quantiser has requirements of its own
        raise DLRError(
            f"{folder} is quantised ({method}) and cannot be undone here: {first_line(error)}"
        ) from error
    check_missing(info, folder)
    model.config.dtype = kind
    model._weight_conversions = None  # or what undid the quantisation is undone when it is saved
    with unpacked(folder, copy) as work:
        model.save_pretrained(work)
    return copy


@contextmanager
def unpacked(source: Path, copy: Path) -> Iterator[Path]:
    """Where a source's copy with plain weights is written: it is `copy` once it is whole, so that a crash leaves
    nothing that a later run would take for a model.

    Raises:
        DLRError: Where it cannot be written.
    """
    try:
        with whole_directory(copy) as work:
            yield work
    except DLRError:
        if not copy.is_dir():  # else another run was faster
            raise
    except (OSError, SafetensorError) as error:
        raise DLRError(f"{source} cannot be unpacked to {copy.parent}: {first_line(error)}") from error
