"""What a locked checkpoint keeps of its source's directory besides the weights, and what its card says of it."""

import os
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from .files import permission_is_an_error
from .hub import OTHER_WEIGHTS, PICKLES, encoder_parts

# Files by how they start, whatever they are called: pickles of protocols 2 to 5, archives (torch saves are such), GGUF,
# HDF5.
_MAGIC = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04|GGUF|\x89HDF")
# What is true of the original alone, by name: descriptions of other formats and of quantised weights (params.json makes
# vLLM look for Mistral's own files), checksums, records of its training and figures measured of it.
_UNTRUE = re.compile(
    r"params\.json|.*quant(ize)?_config\.json|.*(sha256|sha512|md5|checksum).*|.*tfevents.*|trainer_state\.json|"
    r".*_results\.(json|txt)|train(er|ing)_args.*",
    re.IGNORECASE,
)
# Written anew, as are the weights.
_REPLACED = re.compile(r"model\.safetensors\.index\.json|readme\.md|dlr_manifest\.json", re.IGNORECASE)
# Licences by how their texts start.
_TITLES = {
    "Apache License Version 2.0": "apache-2.0",
    "MIT License": "mit",
    "GNU AFFERO GENERAL PUBLIC LICENSE Version 3": "agpl-3.0",
    "GNU LESSER GENERAL PUBLIC LICENSE Version 3": "lgpl-3.0",
    "GNU GENERAL PUBLIC LICENSE Version 3": "gpl-3.0",
    "Attribution-NonCommercial 4.0 International": "cc-by-nc-4.0",
    "Attribution 4.0 International": "cc-by-4.0",
}


def carry_over(source: Path, to: Path, weights: Collection[str]) -> str | None:
    """Copies everything of a model's directory that holds for its locked version, too, whatever it may be called.

    That is all but weights, pickles, other formats, what tells of these or of the original's training, hidden files,
    and links that lead out of the directory (a hub copy's links to its own blobs are its files). Of weights in
    subfolders those of a sentence encoder's further modules are kept; a subfolder with others is left behind whole.

    Args:
        source: A transformers directory.
        to: An empty directory; what is saved into it afterwards replaces what was copied.
        weights: The names of the source's own weight files, which are replaced as its card is.

    Returns:
        A sentence that names what was left behind, None where that is nothing.
    """
    left: list[str] = []
    with permission_is_an_error():
        for name in _kept(source, weights, left):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, to / name)
    return f"left behind from the source's directory: {listed(sorted(left))}" if left else None


def _kept(source: Path, weights: Collection[str], left: list[str]) -> Iterator[str]:
    """The files to keep, by their paths in the source; those of what is left behind are added to `left`."""
    parts = encoder_parts(source)

    def unreadable(error: OSError) -> None:
        raise error

    for here, folders, files in os.walk(source, onerror=unreadable):
        inner = Path(here).relative_to(source)
        for folder in [name for name in folders if name.startswith(".")]:
            folders.remove(folder)
        for folder in list(folders):
            name = str(inner / folder)
            of_encoder = any(part == name or part.startswith(f"{name}/") for part in parts)
            if (source / name).is_symlink() or (_has_weights(source / name) and not of_encoder):
                folders.remove(folder)
                left.append(f"{name}/")
        for file in files:
            name = str(inner / file)
            if file.startswith(".") or name in weights or _REPLACED.fullmatch(name):
                continue
            others = file.lower().endswith(".safetensors") and str(inner) not in parts
            if others or _UNTRUE.fullmatch(file) or not _is_sound(source / name, source):
                left.append(name)
            else:
                yield name


def _is_sound(path: Path, source: Path) -> bool:
    """Whether a file is one, lies in the folder, and is neither pickled nor in another format of weights."""
    real, root = path.resolve(), source.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not real.is_file() or not (real.is_relative_to(root) or real.parent == blobs):
        return False
    names = (path.name.lower(), real.name.lower())
    if any(
        name.endswith((*PICKLES, *OTHER_WEIGHTS)) or re.search(r"\.index(\.\w+)?\.json$", name)
        for name in names
    ):
        return False
    if real.suffix == ".safetensors" and path.suffix != ".safetensors":
        return False
    with real.open("rb") as file:
        return not _MAGIC.match(file.read(4))


def _has_weights(folder: Path) -> bool:
    kinds = (".safetensors", *PICKLES, *OTHER_WEIGHTS)
    return any(name.lower().endswith(kinds) for _, _, names in os.walk(folder) for name in names)


def listed(names: Sequence[str]) -> str:
    """The first twelve names, and how many more there are."""
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more


def licence(source: Path) -> dict[str, str]:
    """What a model's directory says of its licence, as the fields of a model card's metadata; empty where nothing."""
    from huggingface_hub import metadata_load

    said: Any = {}
    try:
        said = metadata_load(source / "README.md") or {}
    except Exception:  # no card, or one whose metadata are no YAML: every reader of it fails in its own way
        said = {}
    found = {
        key: str(said[key])
        for key in ("license", "license_name", "license_link")
        if isinstance(said, dict) and isinstance(said.get(key), str)
    }
    if "license" in found:
        return found
    for file in sorted(source.iterdir()):
        if not re.match(r"(licen[cs]e|copying)\b", file.name, re.IGNORECASE) or not file.is_file():
            continue
        text = " ".join(file.read_text(encoding="utf-8", errors="replace")[:2000].split())
        for title, name in _TITLES.items():
            if title in text:
                return {"license": name}
        return {"license": "other", "license_name": file.stem.lower(), "license_link": file.name}
    return {}
