"""Directories that appear whole or not at all, on a real full device where one can be mounted."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from dlr_lock.common.errors import DLRError
from dlr_lock.common.files import MANIFEST, check_space, check_target, whole_directory


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_it_appears_at_the_end_with_ordinary_permissions(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with whole_directory(target) as work:
        (work / "file").write_text("x")
        assert not target.exists()
    assert names(target.parent) == ["out"] and names(target) == ["file"]
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_a_failure_leaves_nothing_and_keeps_the_old_one(error: type[BaseException], tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / MANIFEST).write_text("old")
    with pytest.raises(error), whole_directory(target, overwrite=True) as work:
        (work / "file").write_text("x")
        raise error
    assert names(tmp_path) == ["out"] and (target / MANIFEST).read_text() == "old"


def test_overwriting_replaces_the_whole_directory(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale.safetensors").write_text("old")
    (target / MANIFEST).write_text('{"files": {"stale.safetensors": {}}}')
    with whole_directory(target, overwrite=True) as work:
        (work / MANIFEST).write_text("new")
    assert names(tmp_path) == ["out"] and names(target) == [MANIFEST]
    assert (target / MANIFEST).read_text() == "new"


def test_only_a_locked_checkpoint_is_ever_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    for overwrite, says in ((False, "exists"), (True, "no locked checkpoint")):
        with pytest.raises(DLRError, match=says):
            check_target(tmp_path / "home", overwrite=overwrite)
    with pytest.raises(DLRError, match="not a directory"):
        check_target(tmp_path / "home" / "thesis.txt", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "home")
    with pytest.raises(DLRError, match="not a directory"):
        check_target(tmp_path / "link", overwrite=True)
    with pytest.raises(DLRError, match="cannot write"):
        check_target(tmp_path / "home" / "thesis.txt" / "out", overwrite=False)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", overwrite=False)


def test_files_of_the_user_inside_a_checkpoint_are_not_deleted(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "original").mkdir(parents=True)
    (target / MANIFEST).write_text('{"files": {}}')
    (target / "original" / "model.safetensors").write_text("precious")
    with pytest.raises(DLRError, match=r"original/model\.safetensors"):
        check_target(target, overwrite=True)


def test_no_space_is_said_in_one_line(tmp_path: Path) -> None:
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("io: No space left on device"),
    ):
        with pytest.raises(DLRError, match="no space left on the device"), whole_directory(tmp_path / "out"):
            raise error
    assert names(tmp_path) == []
    with pytest.raises(DLRError, match="MiB are needed"):
        check_space(tmp_path / "out", 2**60)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small device needs root")
def test_a_device_that_is_really_full(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let us mount a small device")
    try:
        with (
            pytest.raises(DLRError, match="no space left on the device"),
            whole_directory(small / "out") as work,
        ):
            (work / "big").write_bytes(bytes(2 * 2**20))
        assert names(small) == []
    finally:
        subprocess.run(["umount", small], check=True)
