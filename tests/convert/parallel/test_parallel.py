"""A conversion by several processes, as its users see it: the same model, by whatever number, whoever is killed."""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import Launched, command
from parallel_runs import make_source, options, same_bits, words
from torch import distributed

from dlr_lock import DLRSpec, convert_model
from dlr_lock.convert.activations import Activations
from dlr_lock.convert.config import Recipe
from dlr_lock.convert.distill import distill
from dlr_lock.convert.parallel.ranks import joined, leave
from dlr_lock.convert.parallel.share import Share
from dlr_lock.runtime import verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, a text, and what one process makes of them in either way."""
    path = tmp_path_factory.mktemp("parallel")
    make_source(path)
    for across in ("independent", "sequential"):
        convert_model(path / "source", path / across, **options(path, across))
    return path


def start(size: int, given: list[str], log: Path, **more: Any) -> Launched:
    return Launched(size, command, *given, log=log, **more)


def facts(out: Path) -> dict[str, Any]:
    return json.loads((out / "dlr_manifest.json").read_text())["conversion"]


def count_exchanges(log: Path) -> None:
    """What one process of a fit holds, and what it exchanges in fits of different lengths, as JSON into `log`."""
    ranks = joined()
    calls: Counter[str] = Counter()
    for name in ("all_reduce", "all_gather", "broadcast"):
        setattr(distributed, name, counted(getattr(distributed, name), calls, name))
    text = torch.arange(12)[:, None].expand(12, 16)  # sequence s holds s in every place
    share = Share(ranks, text[:10], text[10:])
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(12, 16, 32, generator=generator)
    x = table[share.tokens[:, 0]].flatten(0, 1)
    pairs = Activations(x, x.square(), torch.arange(len(x)) % 16 == 0, mapped=False)
    pairs.share = share
    spec = DLRSpec(32, 1, 2, 16, "silu", False)
    found = []
    for steps in (10, 20):
        calls.clear()
        fitted = distill(
            pairs, 160, spec, Recipe(64 * steps, 64, "random"), name="it", device=torch.device("cpu")
        )
        found.append(dict(calls))
    sums = [w.double().sum().item() for w in fitted.values()]
    leave()
    facts = {"rows": len(x), "calls": found, "weights": sums}
    (log / f"facts{ranks.rank}.json").write_text(json.dumps(facts))


def counted(call: Callable[..., Any], calls: Counter[str], name: str) -> Callable[..., Any]:
    def one(*args: Any, **named: Any) -> Any:
        calls[name] += 1
        return call(*args, **named)

    return one


def test_a_process_holds_its_share_and_a_step_has_three_exchanges(tmp_path: Path) -> None:
    """One sum of gradients, and one gathering of Muon's blocks for each of A and B."""
    run = Launched(3, count_exchanges, tmp_path, log=tmp_path / "log")
    assert run.ended() == [0, 0, 0], run.said()
    facts = [json.loads((tmp_path / f"facts{rank}.json").read_text()) for rank in range(3)]
    assert [f["rows"] for f in facts] == [16 * 5, 16 * 4, 16 * 3]  # of 10 and 2 sequences
    assert all(f["weights"] == facts[0]["weights"] for f in facts)  # the same bits
    for one, two in (f["calls"] for f in facts):
        assert two["all_reduce"] - one["all_reduce"] == 10
        assert two["all_gather"] - one["all_gather"] == 20
        assert two["broadcast"] == one["broadcast"] == 2  # where it starts, and where it ends


def test_modules_dealt_out_give_the_same_bits(folder: Path, tmp_path: Path) -> None:
    run = start(3, words(folder, tmp_path / "out", "independent"), tmp_path / "log")
    assert run.ended() == [0, 0, 0], run.said()
    assert same_bits(folder / "independent", tmp_path / "out") and verify(tmp_path / "out") == []
    ours, theirs = facts(tmp_path / "out"), facts(folder / "independent")
    for one, two in zip(ours["modules"], theirs["modules"], strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert ours["evaluation"] == theirs["evaluation"] and ours["warnings"] == theirs["warnings"]
    assert "written to" in run.said()[0] and run.said()[1:] == ["", ""]
    assert run.said()[0].count("redistilling model") == 1  # the others did the rest
    assert not (tmp_path / "out.partial").exists()


@pytest.fixture(scope="module")
def by_three(folder: Path) -> Path:
    """What three processes make of the source, its text dealt out."""
    run = start(3, words(folder, folder / "three", "sequential"), folder / "log")
    assert run.ended() == [0, 0, 0], run.said()
    return folder / "three"


@pytest.fixture(scope="module")
def by_two(folder: Path) -> Path:
    """The same of two."""
    run = start(2, words(folder, folder / "two", "sequential"), folder / "log")
    assert run.ended() == [0, 0], run.said()
    return folder / "two"


@pytest.mark.parametrize("by", ["by_two", "by_three"])
def test_text_dealt_out_gives_the_same_chains_but_for_rounding(
    by: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    ours, theirs = facts(request.getfixturevalue(by)), facts(folder / "sequential")
    for one, two in zip(ours["modules"], theirs["modules"], strict=True):
        for figure in ("rel_error", "first_error", "drift", "coupling"):
            assert one[figure] == pytest.approx(two[figure], rel=1e-3), (one, two)
        assert one["verdict"] == two["verdict"]
        for figure in (
            ("error", "chain_error") if two["redistillation"] else ()
        ):  # one that is EMPTY is not attacked
            assert one["redistillation"][figure] == pytest.approx(two["redistillation"][figure], rel=3e-3)
    assert theirs["modules"][0]["redistillation"]
    assert ours["end_to_end"]["evaluation_after"]["kl"] < ours["end_to_end"]["evaluation_before"]["kl"]
    for one, two in zip(
        (ours["evaluation"], *_looks(ours)), (theirs["evaluation"], *_looks(theirs)), strict=True
    ):
        assert one["kl"] == pytest.approx(two["kl"], rel=1e-3)
    assert ours["warnings"] == theirs["warnings"]


def _looks(made: dict[str, Any]) -> tuple[Any, Any]:
    return made["end_to_end"]["evaluation_before"], made["end_to_end"]["evaluation_after"]


def interrupted(given: list[str], out: Path, size: int, log: Path) -> None:
    """Two runs that lose a process, at a moment and of a number that nobody chose, and one to the end."""
    draw = random.Random()
    for number in range(2):
        run = start(size, given, log / str(number))
        run.await_words()
        time.sleep(draw.uniform(0.0, 1.5))
        victim = draw.randrange(size)
        run.kill(victim)
        statuses = run.ended()
        if statuses == [0] * size:  # it was faster
            return
        assert statuses[victim] == -9 and all(s == 2 for n, s in enumerate(statuses) if n != victim), (
            run.said()
        )
        assert len(run.lines()) == 1 and "Traceback" not in "".join(run.said()), run.said()
        assert not out.exists()
    assert start(size, given, log / "last").ended() == [0] * size


def test_modules_dealt_out_go_on_to_the_same_bits_whoever_was_killed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    interrupted(words(folder, tmp_path / "out", "independent"), tmp_path / "out", 3, tmp_path / "log")
    assert same_bits(tmp_path / "out", folder / "independent")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "out"]


def test_text_dealt_out_goes_on_to_the_same_bits_whoever_was_killed(
    by_three: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "log").mkdir()
    interrupted(words(folder, tmp_path / "out", "sequential"), tmp_path / "out", 3, tmp_path / "log")
    assert same_bits(tmp_path / "out", by_three)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "out"]


def test_torchrun_starts_it_and_what_is_wrong_is_said_once(folder: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = words(folder, folder / "no", "sequential")
    done = subprocess.run(
        [*launcher, "-m", "dlr_lock", *given, "--depht", "3"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("dlr-lock:")]
    assert done.returncode and len(lines) == 1 and "No such option: --depht" in lines[0]
    assert len(re.findall(r"exitcode +: 2 ", done.stderr)) == 2


def test_what_is_wrong_is_said_once(folder: Path, tmp_path: Path) -> None:
    """Also where the first process has the store, and nobody ends the others."""
    for number, (given, says, alone) in enumerate(
        (
            (["convert", "--depht", "3"], "No such option: --depht", True),
            (words(folder, tmp_path / "out", "sequential", rank=24), "multiple of 16, not 24", True),
            (
                words(folder, tmp_path / "out", "sequential", tokens=256),
                "2 sequences of calibration text",
                False,
            ),
            (words(folder, folder / "sequential", "sequential"), "exists; choose another output", False),
            (["inspect", str(folder / "sequential")], "inspect runs in one process", False),
        )
    ):
        run = start(3, given, tmp_path / f"log{number}", alone=alone)
        assert run.ended() == [2, 2, 2], run.said()
        (line,) = run.lines()
        assert says in line and "Traceback" not in "".join(run.said())
