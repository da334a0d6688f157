"""A conversion by several processes, as its users see it: the same model, by whatever number, whoever is killed."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from launched import Launched, command
from parallel_runs import make_source, options, same_bits, words
from torch import distributed

from dlr_lock import DLRSpec, convert_model
from dlr_lock.convert import pipeline
from dlr_lock.convert.activations.pairs import Activations
from dlr_lock.convert.config import Recipe
from dlr_lock.convert.distill import distill
from dlr_lock.convert.parallel.ranks import joined, leave
from dlr_lock.convert.parallel.share import Share
from dlr_lock.runtime import verify

KILLS = int(os.environ.get("KILLS", "1"))  # of each kind of run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, a text, and what one process makes of them in either way."""
    path = tmp_path_factory.mktemp("parallel")
    make_source(path)
    for across in ("independent", "sequential"):
        convert_model(path / "source", path / across, **options(path, across))
    return path


class Made(NamedTuple):
    """An unbroken run's checkpoint, what its processes said, and the seconds from its first words to its end."""

    out: Path
    said: list[str]
    seconds: float


@pytest.fixture(scope="module")
def made(folder: Path) -> Callable[[int, str], Made]:
    """What so many processes make of the source, in either way; each made once."""

    @cache
    def make(size: int, across: str) -> Made:
        place = folder / f"{size}-{across}"
        place.mkdir()
        run = start(size, words(folder, place / "out", across), place / "log")
        run.await_words()
        began = time.monotonic()
        assert run.ended() == [0] * size, run.said()
        return Made(place / "out", run.said(), time.monotonic() - began)

    return make


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


def test_modules_dealt_out_give_the_same_bits(folder: Path, made: Callable[[int, str], Made]) -> None:
    out, said, _ = made(3, "independent")
    assert same_bits(folder / "independent", out) and verify(out) == []
    ours, theirs = facts(out), facts(folder / "independent")
    for one, two in zip(ours["modules"], theirs["modules"], strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert ours["evaluation"] == theirs["evaluation"] and ours["warnings"] == theirs["warnings"]
    assert "written to" in said[0] and said[1:] == ["", ""]
    assert said[0].count("redistilling model") == 1  # the others did the rest
    assert not out.with_name("out.partial").exists()


def dealt_otherwise(*given: str) -> None:
    """A conversion in a process that would deal out modules in another way than the first one."""
    deal = pipeline.dealt_modules
    if os.environ["RANK"] != "0":
        pipeline.dealt_modules = lambda *amounts: deal(*amounts)[::-1]
    command(*given)


def test_the_first_process_deals_out_modules(folder: Path, tmp_path: Path) -> None:
    """What a fit is counted as depends on the machine's threads, of which another one may have more."""
    given = words(folder, tmp_path / "out", "independent")
    run = Launched(2, dealt_otherwise, *given, log=tmp_path / "log")
    assert run.ended() == [0, 0], run.said()
    assert same_bits(folder / "independent", tmp_path / "out")


@pytest.mark.parametrize("size", [2, 3])
def test_text_dealt_out_gives_the_same_chains_but_for_rounding(
    size: int, folder: Path, made: Callable[[int, str], Made]
) -> None:
    ours, theirs = facts(made(size, "sequential").out), facts(folder / "sequential")
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


@pytest.mark.parametrize(
    ("size", "across"),
    [(1, "sequential"), (3, "independent"), (3, "sequential")],
    ids=lambda value: str(value),
)
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(
    size: int, across: str, made: Callable[[int, str], Made], folder: Path, tmp_path: Path
) -> None:
    """kill -9 of one process or of all, at moments and of numbers that nobody chose. `KILLS=20` for as many a way."""
    unbroken, draw, kills = made(size, across), random.Random(), 0
    while kills < KILLS:
        place = tmp_path / str(kills)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        given = words(folder, place / "out", across)
        run = start(size, given, place / "log")
        run.await_words()
        moment = draw.uniform(0.0, unbroken.seconds)
        time.sleep(moment)
        doing = run.said()[0].splitlines()[-1]
        victims = draw.choice([*([rank] for rank in range(size)), list(range(size))])
        for rank in victims:
            run.kill(rank)
        statuses = run.ended()
        if -9 not in statuses:  # it was faster
            continue
        kills += 1
        print(f"{victims} of {size} {across} killed after {moment:.1f} of {unbroken.seconds:.1f} s: {doing}")
        if not (place / "out").exists():
            assert all(s == (-9 if rank in victims else 2) for rank, s in enumerate(statuses)), run.said()
            assert len(run.lines()) == (len(victims) < size) and "Traceback" not in "".join(run.said()), (
                run.said()
            )
            again = start(size, given, place / "log")
            assert again.ended() == [0] * size, again.said()
            assert sorted(p.name for p in place.iterdir()) == ["log", "out"]
        assert same_bits(place / "out", unbroken.out) and verify(place / "out") == []


def test_much_that_would_be_exchanged_is_said_before_it_is(
    made: Callable[[int, str], Made], folder: Path, tmp_path: Path
) -> None:
    assert "in sequence these processes exchange" not in made(2, "sequential").said[0]
    run = start(2, words(folder, tmp_path / "out", "sequential", train_tokens=2**44), tmp_path / "log")
    run.await_words("distilling")
    assert "in sequence these processes exchange" in run.said()[0] and "TB from each" in run.said()[0]
    run.kill(0)
    run.ended()


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
