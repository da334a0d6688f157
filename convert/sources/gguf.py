"""GGUF files as sources: dequantised by transformers into a plain directory."""

from __future__ import annotations

import json
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...common.cache import cache_folder
from ...common.errors import DLRError, first_line
from ...common.files import hash_files
from ...common.quiet import quiet
from .checks import check_finite, check_missing
from .quantised import unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def from_gguf(file: Path, fingerprint: str, dtype: torch.dtype | str, cache: Path | None) -> Path:
    """Dequantise a GGUF file to `cache`/<name>-<fingerprint>-<dtype>, unless that is there already."""
    if cache is None:
        cache = cache_folder() / "gguf"
    folder = cache / f"{file.stem}-{fingerprint[:16]}-{str(dtype).removeprefix('torch.')}"
    if folder.is_dir():
        return folder
    _check_packages(file)
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The GGUF reader's bar cannot be switched off; it writes to stderr.
    with quiet(), redirect_stderr(StringIO()):
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=dtype,
                output_loading_info=True,
                local_files_only=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                str(file.parent), gguf_file=file.name, local_files_only=True
            )
        except Exception as error:
            # The reader meets a broken file with whatever its parsing trips over.
            raise DLRError(f"{file} cannot be read as GGUF: {first_line(error)}") from error
        check_missing(info, file)
        check_finite(model, file)
        if hash_files([file]) != fingerprint:
            raise DLRError(f"{file} changed while it was read: run again when it is whole")
        with unpacked(file, folder) as work:
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
            if terms := gguf.GGUFReader(file).get_field("general.license"):
                card = f"---\nlicense: {json.dumps(str(terms.contents()))}\n---\n"
                (work / "README.md").write_text(card, encoding="utf-8")
    return folder


def config_of(file: Path) -> PreTrainedConfig:
    """The model's config, from a GGUF file's header alone.

    Raises:
        DLRError: Where it cannot be read, and where packages are missing.
    """
    _check_packages(file)
    from transformers import AutoConfig

    with quiet(), redirect_stderr(StringIO()):
        try:
            return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
        except Exception as error:  # as above
            raise DLRError(f"{file} cannot be read as GGUF: {first_line(error)}") from error


def _check_packages(file: Path) -> None:
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise DLRError(
            f"{file} needs packages that are not installed: pip install 'dlr-lock[gguf]'"
        ) from error
