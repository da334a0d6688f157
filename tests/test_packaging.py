"""The folder-to-import mapping, as an editable install (this one) and as a wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("runtime", "triton_kernels", "convert", "audit")


def test_the_editable_install_imports_these_folders() -> None:
    code = "; ".join(f"import dlr_lock.{p} as m; print(m.__file__)" for p in PARTS)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert found.stdout.split() == [str(ROOT / p / "__init__.py") for p in PARTS]


def test_the_wheel_holds_every_module_and_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for part in PARTS:
        wanted = {f"dlr_lock/{part}/{p.name}" for p in (ROOT / part).glob("*.py")}
        assert wanted and wanted <= names
    assert "dlr_lock/py.typed" in names
    assert not any(name.split("/")[0] in (*PARTS, "tests", "benchmarks") for name in names)
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); import dlr_lock; print(dlr_lock.convert.__file__)"
    # Without the finder of the editable install: the wheel must stand alone.
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]"
    found = subprocess.run(
        [sys.executable, "-c", f"{alone}; {code}"], capture_output=True, text=True, check=True, cwd="/"
    )
    assert found.stdout.strip() == str(site / "dlr_lock" / "convert" / "__init__.py")
