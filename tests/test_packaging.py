"""The folder-to-import mapping, as an editable install (this one) and as a wheel."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
PARTS: dict[str, str] = SETUP["package-dir"]  # import to folder
TOPS = ("dlr_lock", "runtime", "triton_kernels", "convert", "audit")


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {
        path.parent.relative_to(ROOT).as_posix() for top in TOPS for path in (ROOT / top).rglob("*.py")
    }
    assert folders == set(PARTS.values())
    assert set(SETUP["packages"]) == set(PARTS)


def test_the_editable_install_imports_these_folders() -> None:
    code = "; ".join(f"import {name} as m; print(m.__file__)" for name in PARTS)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert found.stdout.split() == [str(ROOT / folder / "__init__.py") for folder in PARTS.values()]


def test_the_wheel_holds_every_module_and_runs(wheel: Path, tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name, folder in PARTS.items():
        wanted = {f"{name.replace('.', '/')}/{path.name}" for path in (ROOT / folder).glob("*.py")}
        assert wanted and wanted <= names
    assert {"dlr_lock/py.typed", "dlr_lock/triton_kernels/native.cpp"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "dlr_lock",
        "dlr_lock_autoload.py",
    }
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); import dlr_lock; print(dlr_lock.convert.__file__)"
    # Without the finder of the editable install: the wheel must stand alone.
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]"
    found = subprocess.run(
        [sys.executable, "-c", f"{alone}; {code}"], capture_output=True, text=True, check=True, cwd="/"
    )
    assert found.stdout.strip() == str(site / "dlr_lock" / "convert" / "__init__.py")
