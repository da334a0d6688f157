"""Writes what was measured into docs/measurements.md: python -m benchmarks.render [--check], or `make results`.

The part between the two marks is made from the newest file of each kind and device under benchmarks/results, and of
nothing else; so is a picture a device beside its files, where matplotlib is installed. The page links only a picture of
those very files. --check writes nothing and fails (exit status 1) where the page says something else than the files do.
"""

import argparse
import difflib
import os
import sys
from pathlib import Path

from dlr_lock import DLRError
from dlr_lock.common.files import write_whole

from . import plots
from .gpu.plan import STAGES
from .output import RESULTS, ROOT
from .schema import kind_of, load
from .tables import TABLES, predictions

PAGE = ROOT / "docs" / "measurements.md"
BEGIN = "<!-- measured: `make results` writes what follows -->"
END = "<!-- measured: end -->"
_STAGES = [name for name in TABLES if name in STAGES]  # what a visit to a GPU measures
_FORECAST = (
    "What an MLP's place takes on a GPU is **not measured yet**. **Predictions** of the cost model for one NVIDIA H200 "
    "in bfloat16 stand here until then, microseconds of the chain / of the MLP it replaces; they are no measurements."
)


def main(arguments: list[str] | None = None) -> int:
    """Renders or checks; exit status 2, and one line, on files that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where the page and the results disagree")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    try:
        old = options.page.read_text(encoding="utf-8")
        devices = newest(options.results)
        if not options.check:
            _draw(devices)
        new = replaced(old, block(devices, options.page.parent))
        if not options.check and new != old:
            write_whole(options.page, lambda path: path.write_text(new, encoding="utf-8"))
    except (DLRError, OSError) as error:
        print(f"benchmarks.render: {error}", file=sys.stderr)
        return 2
    if options.check and new != old:
        print(f"benchmarks.render: {options.page.name} and the results disagree; `make results` renders it")
        for path, documents in _pictures(devices):
            if path.exists() and not plots.is_current(path, documents):
                print(f"{path} is not what was drawn from the newest results")
        for line in difflib.unified_diff(
            old.splitlines(), new.splitlines(), "page", "results", "", "", 0, ""
        ):
            print(line)
        return 1
    return 0


def newest(results: Path) -> dict[str, plots.Documents]:
    """Device to kind to the newest document and its `path`, smoke runs left out.

    Raises DLRError on a file that no run has written.
    """
    found: dict[str, plots.Documents] = {}
    for path in sorted(results.glob("*/*.json"), key=lambda path: path.name):
        kind = kind_of(path)
        if kind is None:
            continue
        document = load(path)
        if document["rows"] and not document.get("smoke"):
            kinds = found.setdefault(document["device"], {})
            if kind not in kinds or kinds[kind]["date"] <= document["date"]:
                kinds[kind] = document | {"path": path}
    return found


def block(devices: dict[str, plots.Documents], home: Path = PAGE.parent) -> str:
    """The Markdown between the marks. home: the page's folder, which links begin from."""
    gpus = [name for name in devices if not name.startswith("CPU ")]
    lines = [
        "`make gpu` measures all of this in one visit to a GPU; `make results` makes tables and plots of its files.",
        "",
    ]
    if not gpus:
        lines += [*_missing({}), ""]
    if not any("kernels" in devices[name] for name in gpus):
        lines += [*_wrapped(_FORECAST), "", *predictions()]
    for device in [*gpus, *(name for name in devices if name not in gpus)]:
        lines += [f"### {device.removeprefix('CPU ')}{' (CPU)' if device not in gpus else ''}", ""]
        path = plots.picture(devices[device])
        if path and plots.is_current(path, devices[device]):
            link = Path(os.path.relpath(path, home)).as_posix()
            lines += [f"![Times of chains over what they replace, against tokens]({link})", ""]
        for kind, render in TABLES.items():
            if kind in devices[device]:
                text = render(devices[device][kind])
                lines += [*_wrapped(text[0]), *text[1:]]
        if device in gpus and not all(name in devices[device] for name in _STAGES):
            lines += [*_missing(devices[device]), ""]
    return "\n".join(lines).rstrip("\n")


def _missing(measured: plots.Documents) -> list[str]:
    names = [{"moretests": "other tests"}.get(name, name) for name in _STAGES if name not in measured]
    return _wrapped(f"On {'this' if measured else 'a'} GPU **not measured yet**: {', '.join(names)}.")


def replaced(page: str, text: str) -> str:
    """The page with `text` between the marks; raises DLRError where they are not there, in order, once."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise DLRError(f"the page must have the lines {BEGIN} and {END} once, in this order")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _pictures(devices: dict[str, plots.Documents]) -> list[tuple[Path, plots.Documents]]:
    return [(path, documents) for documents in devices.values() if (path := plots.picture(documents))]


def _draw(devices: dict[str, plots.Documents]) -> None:
    """All pictures anew, or one line where there is no matplotlib to draw them with."""
    try:
        for path, documents in _pictures(devices):
            plots.draw(path, documents)
    except ImportError:
        print(f"benchmarks.render: {plots.NEEDED}")


def _wrapped(text: str, width: int = 120) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


if __name__ == "__main__":
    sys.exit(main())
