"""What goes wrong around a conversion by several processes: disks, files, file systems."""

import ctypes
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launched import Launched, command
from parallel_runs import make_source, same_bits, words

from dlr_lock import convert_model
from dlr_lock.convert.parallel.balance import dealt


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def once_it_keeps(out: Path, act: Callable[[], object]) -> None:
    """Acts when the first module is kept."""
    until = time.monotonic() + 60
    while not list(out.with_name(f"{out.name}.partial").glob("*.safetensors")):
        assert time.monotonic() < until
        time.sleep(0.01)
    act()


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return


def test_a_full_disk_is_one_line_and_it_goes_on(small_disk: Path, tmp_path: Path) -> None:
    make_source(tmp_path)
    out = small_disk / "out"
    given = words(tmp_path, out, "independent", redistill=0.0)
    run = Launched(3, command, *given, log=tmp_path / "log")
    once_it_keeps(out, lambda: fill(small_disk))
    assert run.ended() == [2, 2, 2], run.said()
    (line,) = run.lines()
    assert "no space left on the device" in line and "Traceback" not in "".join(run.said())
    (small_disk / "filler").unlink()
    again = Launched(2, command, *given, log=tmp_path / "again")
    assert again.ended() == [0, 0], again.said()
    assert "of an interrupted run" in again.said()[0]
    convert_model(tmp_path / "source", tmp_path / "one", **dict(pairs(given)))
    assert same_bits(out, tmp_path / "one")


def pairs(given: list[str]) -> Iterator[tuple[str, object]]:
    for name, value in zip(given[3::2], given[4::2], strict=True):
        kind = float if "." in value and "/" not in value else int
        yield name[2:].replace("-", "_"), kind(value) if value[0].isdigit() else value


def test_a_source_that_is_cut_short_or_vanishes_is_one_line(tmp_path: Path) -> None:
    weights = make_source(tmp_path) / "model.safetensors"
    given, whole = words(tmp_path, tmp_path / "out", "independent"), weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    run = Launched(3, command, *given, log=tmp_path / "log")
    assert run.ended() == [2, 2, 2]
    (line,) = run.lines()
    assert "truncated or damaged" in line
    weights.write_bytes(whole)
    run = Launched(3, command, *given, log=tmp_path / "log")
    once_it_keeps(tmp_path / "out", weights.unlink)
    assert run.ended() == [2, 2, 2], run.said()
    (line,) = run.lines()
    assert "model.safetensors" in line and "Traceback" not in "".join(run.said())


def hidden_from_the_second(folder: str, *given: str) -> None:
    if os.environ["RANK"] == "1":  # a mount that this process alone has, in a folder's place
        assert not ctypes.CDLL(None).unshare(0x00020000)
        for line in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "tmpfs", folder]):
            subprocess.run(line, check=True)
    command(*given)


def test_an_output_that_a_process_does_not_see_is_said_at_the_start(small_disk: Path, tmp_path: Path) -> None:
    make_source(tmp_path)
    given = words(tmp_path, small_disk / "out", "sequential")
    run = Launched(2, hidden_from_the_second, str(small_disk), *given, log=tmp_path / "log")
    assert run.ended() == [2, 2], run.said()
    (line,) = run.lines()
    assert f"cannot write to {small_disk} as the first process does" in line
    assert list(small_disk.iterdir()) == []


def test_the_dearest_first_to_who_has_least() -> None:
    assert dealt([1.0, 1.0, 1.0, 1.0], 2) == [[0, 2], [1, 3]]
    assert dealt([1.0, 9.0, 4.0, 4.0, 1.0], 2) == [[1, 4], [0, 2, 3]]
    assert dealt([5.0], 3) == [[0], [], []]
