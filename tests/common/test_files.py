"""Directories that appear whole or not at all, on a real full device where one can be mounted."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import ones

from dlr_lock.common.errors import DLRError
from dlr_lock.common.files import MANIFEST, check_readable, check_space, check_target, whole_directory


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


def test_the_umask_decides_on_every_file_whoever_wrote_it(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(mask)
        try:
            with whole_directory(tmp_path / f"out{mask}") as work:
                (work / "1_Pooling").mkdir(mode=0o700)
                save_file({"a": ones(3)}, work / "model.safetensors")  # 0600 by itself
                (work / "1_Pooling" / "config.json").write_text("{}")
        finally:
            os.umask(before)
        for name in ("model.safetensors", "1_Pooling/config.json"):
            assert (tmp_path / f"out{mask}" / name).stat().st_mode & 0o777 == mode
        assert (tmp_path / f"out{mask}" / "1_Pooling").stat().st_mode & 0o777 == 0o777 & ~mask


KILLED = """
import sys, time
from pathlib import Path
from dlr_lock.common.files import whole_directory
with whole_directory(Path(sys.argv[1])) as work:
    (work / "big").write_bytes(bytes(2**20))
    print("there", flush=True)
    time.sleep(600)
"""


@contextmanager
def writing(target: Path) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_what_a_killed_run_left_goes_with_the_next_and_what_a_living_one_has_stays(tmp_path: Path) -> None:
    with writing(tmp_path / "out") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(names(tmp_path)) == 1
        with writing(tmp_path / "other"), whole_directory(tmp_path / "out") as work:
            assert len(names(tmp_path)) == 2 and work.name in names(tmp_path)
            with pytest.raises(RuntimeError), whole_directory(tmp_path / "out") as second:
                assert work.is_dir() and second.is_dir()  # neither takes the other for a leftover
                raise RuntimeError
    assert not any(name.startswith(".out.") for name in names(tmp_path))


def test_a_checkpoint_that_was_being_replaced_when_the_run_was_killed_is_put_back(tmp_path: Path) -> None:
    old = tmp_path / ".out.abcd_123.old" / "out"
    old.mkdir(parents=True)
    (old / MANIFEST).write_text("old")
    with pytest.raises(DLRError, match="exists"), whole_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / MANIFEST).read_text() == "old"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("kind", [["-t", "tmpfs", "tmpfs"], ["--bind", "elsewhere"]])
def test_a_mount_point_is_refused_before_the_work(kind: list[str], tmp_path: Path) -> None:
    for name in ("my out", "elsewhere"):
        (tmp_path / name).mkdir()
    if subprocess.run(["mount", *kind, "my out"], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        with pytest.raises(DLRError, match="is a mount point, which cannot be replaced"):
            check_target(tmp_path / "my out", overwrite=False)
        check_target(tmp_path / "my out" / "new", overwrite=False)
    finally:
        subprocess.run(["umount", tmp_path / "my out"], check=True)


def test_what_may_not_be_read_is_no_damage(nobodys: Path) -> None:
    (nobodys / "file").write_text("x")
    check_readable(nobodys, "*")
    for path, mode in ((nobodys / "file", 0o200), (nobodys, 0o600), (nobodys, 0o300)):
        path.chmod(mode)
        with pytest.raises(DLRError, match="permission denied; change its permissions"):
            check_readable(nobodys, "*")
        path.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="making a folder of another user needs root")
def test_another_users_folder_in_a_shared_place_is_refused_before_the_work(nobodys: Path) -> None:
    """As in /tmp: everyone may write there, and only a folder's owner may replace it."""
    os.seteuid(0)
    (nobodys / "shared" / "out").mkdir(parents=True)
    (nobodys / "shared").chmod(0o1777)
    os.seteuid(65534)
    with pytest.raises(DLRError, match="is another user's and cannot be replaced"):
        check_target(nobodys / "shared" / "out", overwrite=False)
    check_target(nobodys / "shared" / "own", overwrite=False)
