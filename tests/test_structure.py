"""The shape of the program: which folder imports which, how large its parts are, and that the documents' links lead on.

docs/architecture.md says the same in words.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Folder, its name below dlr_lock, and what it may import of ours; the face of the package and its command line may all.
RULES = (
    ("audit", "audit", {"convert", "microbench", "runtime", "triton_kernels", "reporting", "common"}),
    (
        "dlr_lock/compare",
        "compare",
        {"convert", "microbench", "runtime", "triton_kernels", "reporting", "common"},
    ),
    (
        "dlr_lock/planning",
        "planning",
        {"audit", "convert", "runtime", "triton_kernels", "reporting", "common"},
    ),
    ("convert", "convert", {"runtime", "triton_kernels", "reporting", "common"}),
    ("dlr_lock/microbench", "microbench", {"runtime", "triton_kernels", "reporting", "common"}),
    ("runtime", "runtime", {"triton_kernels", "common"}),
    ("triton_kernels", "triton_kernels", {"common"}),
    ("dlr_lock/reporting", "reporting", {"common"}),
    ("dlr_lock/common", "common", set()),
)
CONVERT_FILES, CONVERT_LEVELS = 18, 6
LONGEST_FILE, LONGEST_README = 450, 120


def imports(path: Path, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """What a file of a package, such as ("convert",), imports of ours: paths of names below dlr_lock."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (tuple(name.split(".")[1:]) for name in names if name.split(".")[0] == "dlr_lock")
        elif isinstance(node, ast.ImportFrom):
            start = ("dlr_lock", *package)[: len(package) + 2 - node.level] if node.level else ()
            module = (*start, *(node.module or "").split(".")) if node.module else start
            if module[:1] == ("dlr_lock",):
                yield from ((*module[1:], alias.name) for alias in node.names)


def faults_of_direction(root: Path) -> list[str]:
    """One line for each import that points up, or to the side."""
    faults = []
    for folder, name, below in RULES:
        for path in sorted((root / folder).rglob("*.py")):
            package = (name, *path.relative_to(root / folder).parent.parts)
            for target in imports(path, package):
                if target[0] not in {name, *below}:
                    faults.append(f"{path.relative_to(root)} imports {'.'.join(target)}")
    return faults


def levels(root: Path) -> dict[str, int]:
    """Of every module of convert/, 1 + the deepest of the convert modules that it imports. __init__ is left out."""
    modules = {p.stem: p for p in (root / "convert").glob("*.py") if p.stem != "__init__"}

    @cache
    def level(name: str) -> int:
        below = {t[1] for t in imports(modules[name], ("convert",)) if t[0] == "convert" and len(t) > 1}
        return 1 + max((level(other) for other in below & modules.keys() - {name}), default=0)

    return {name: level(name) for name in modules}


def own_files(root: Path) -> list[Path]:
    """Our Python files outside the tests."""
    folders = ("dlr_lock", "runtime", "triton_kernels", "convert", "audit", "benchmarks", "examples")
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def broken_links(page: Path) -> list[str]:
    """The files, and the headings in them, that a page of Markdown links to and that are not there."""
    faults = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        path = page.parent / name if name else page
        if "://" in target:
            continue
        if not path.exists():
            faults.append(f"{page.name} links {name}, which is not there")
        elif heading and heading not in _anchors(path):
            faults.append(f"{page.name} links {target}, and {path.name} has no such heading")
    return faults


def _anchors(page: Path) -> set[str]:
    """The headings of a page as links spell them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_imports_point_one_way() -> None:
    assert faults_of_direction(ROOT) == []


def test_an_import_that_points_up_is_seen(tmp_path: Path) -> None:
    (tmp_path / "runtime" / "inner").mkdir(parents=True)
    (tmp_path / "runtime" / "a.py").write_text("def f():\n    from ..convert.data import read_text\n")
    (tmp_path / "runtime" / "inner" / "b.py").write_text(
        "import dlr_lock.audit.config\nfrom ... import cli\n"
    )
    (tmp_path / "runtime" / "c.py").write_text(
        "from .spec import DLRSpec\nfrom ..common import files\nimport os\n"
    )
    assert faults_of_direction(tmp_path) == [
        "runtime/a.py imports convert.data.read_text",
        "runtime/inner/b.py imports audit.config",
        "runtime/inner/b.py imports cli",
    ]


def test_convert_stays_small() -> None:
    files = sorted((ROOT / "convert").glob("*.py"))
    assert len(files) <= CONVERT_FILES, [path.name for path in files]
    deepest = levels(ROOT)
    assert max(deepest.values()) <= CONVERT_LEVELS, sorted(deepest.items(), key=lambda item: item[1])


def test_levels_count_what_is_imported_for_types_alone(tmp_path: Path) -> None:
    (tmp_path / "convert").mkdir()
    for name, text in {
        "a": "import torch\n",
        "b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import A\n",
        "c": "from . import b\n",
        "__init__": "from .c import C\n",
    }.items():
        (tmp_path / "convert" / f"{name}.py").write_text(text)
    assert levels(tmp_path) == {"a": 1, "b": 2, "c": 3}


def test_no_file_is_too_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in own_files(ROOT)}
    assert {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > LONGEST_FILE} == {}


def test_the_readme_is_for_a_user_with_little_time() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST_README


PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One: way\n[a](page.md#one-way) [b](no.md) [c](#two) [d](https://example.org/x)\n")
    assert broken_links(page) == [
        "page.md links no.md, which is not there",
        "page.md links #two, and page.md has no such heading",
    ]


NOT_LOGS = [p for p in PAGES if "experiments" not in p.parts and p.name != "CHANGELOG.md"]


@pytest.mark.parametrize("page", NOT_LOGS, ids=lambda page: page.name)
def test_what_is_named_is_there(page: Path) -> None:
    """Paths of the repository in code spans, and names said to be in one: `file.py`: `name`, or the reverse."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    tops = "dlr_lock|runtime|triton_kernels|convert|audit|benchmarks|tests|docs|examples"
    file = rf"`((?:{tops})/[\w./-]*)`"
    assert [name for name in re.findall(file, text) if not (ROOT / name).exists()] == []
    said = [(name, path) for path, name in re.findall(rf"{file}: `(\w+)`", text)]
    said += re.findall(rf"`(\w+)`\s+in\s+{file}", text)
    assert [
        (name, path) for name, path in said if name not in (ROOT / path).read_text(encoding="utf-8")
    ] == []
