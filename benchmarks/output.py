"""Where results go: one folder a device, one file a run, each written whole or not at all."""

import hashlib
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dlr_lock.common.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# The folders of dlr_lock that a result depends on.
_PARTS = ("common", "compare", "microbench", "runtime", "triton_kernels", "convert", "audit")


def folder(device: str, out: Path | None = None) -> Path:
    """`out`, or the folder of a device's name among the results."""
    return out or RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def target(document: dict[str, Any], kind: str, out: Path | None) -> Path:
    """The JSON file of a run of `kind`: in `out`, or in the folder of document["device"] among the results."""
    date = re.sub(r"[-:]|\+.*", "", document["date"])
    return folder(document["device"], out) / f"{kind}-{date}.json"


def files(where: Path, kind: str) -> list[Path]:
    """The files of a kind in a folder, the newest first."""
    return sorted(where.glob(f"{kind}-[0-9]*.json"), key=lambda path: path.name, reverse=True)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a document; NaN and infinity are refused."""
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def source() -> str:
    """Twelve digits that name what was measured and what measured it: of the SHA-256 over the modules of both."""
    digest = hashlib.sha256()
    folders = {"benchmarks": Path(__file__).parent}
    for part in _PARTS:
        found = find_spec(f"dlr_lock.{part}")
        assert found is not None and found.origin is not None
        folders[part] = Path(found.origin).parent
    for part, within in folders.items():
        for path in sorted(within.rglob("*.py")):
            digest.update(f"{part}/{path.relative_to(within).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
