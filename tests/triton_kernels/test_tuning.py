"""The tuner with a clock of our own: what it keeps, for whom, and what it does not trust."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dlr_lock.triton_kernels import tuning
from dlr_lock.triton_kernels.cost import choose, decode_plan
from dlr_lock.triton_kernels.decode_plan import DecodePlan
from dlr_lock.triton_kernels.gpu import H200
from dlr_lock.triton_kernels.rounds import Shape

SHAPE = Shape(lanes=1, depth=64, rank=32, hidden=1024, tokens=1)
ARGS = (SHAPE, H200, 16, False)
Clock = Callable[[Callable[[], object]], float]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DLR_LOCK_CACHE", str(tmp_path / "cache"))
    tuning.forget()
    yield tmp_path / "cache" / "tuning.json"
    tuning.forget()


def run_with(times: Callable[[DecodePlan | None], float]) -> DecodePlan | None:
    """Tunes with a clock that shows times(plan)."""
    tried: list[DecodePlan | None] = []

    def seconds(call: Callable[[], object]) -> float:
        call()
        return times(tried[-1])

    return tuning.tune(*ARGS, run=tried.append, seconds=seconds)


def test_the_fastest_is_kept_across_processes(own_cache: Path) -> None:
    assert tuning.tuned(*ARGS) is None
    best = run_with(lambda plan: 1.0 if plan is None else 1.0 / plan.steps + 0.01 * plan.num_warps)
    plan = decode_plan(*ARGS)
    assert best is not None and plan is not None and best == replace(plan, steps=16, num_warps=4)
    tuning.forget()  # as a new process
    assert tuning.tuned(*ARGS) == (best,)
    assert own_cache.is_file() and len(list(own_cache.parent.iterdir())) == 1


def test_prefill_may_win() -> None:
    assert run_with(lambda plan: 0.5 if plan is None else 1.0) is None
    assert tuning.tuned(*ARGS) == (None,)


def test_tokens_share_an_entry_up_to_a_power_of_two() -> None:
    eight = (replace(SHAPE, tokens=8), H200, 16, False)
    tuning.tune(*eight, run=lambda plan: None, seconds=lambda call: 1.0)
    assert tuning.tuned(replace(SHAPE, tokens=5), *eight[1:]) is not None
    for other in ((replace(SHAPE, tokens=9), *eight[1:]), (*eight[:3], True), (eight[0], H200, 8, False)):
        assert tuning.tuned(*other) is None
    assert tuning.tuned(eight[0], replace(H200, name="another"), 16, False) is None


def test_a_candidate_that_fails_is_passed_over_unless_all_do() -> None:
    def fails(plan: DecodePlan | None) -> float:
        if plan is not None:
            raise RuntimeError("out of resources")
        return 1.0

    assert run_with(fails) is None

    def always(plan: DecodePlan | None) -> float:
        raise RuntimeError("no device")

    with pytest.raises(RuntimeError, match="no device"):
        run_with(always)


@pytest.mark.parametrize(
    "damage", ["not json", "[]", '{"versions": {}, "entries": {}}', "other torch", "strange entry"]
)
def test_a_table_that_cannot_be_trusted_is_not_used(own_cache: Path, damage: str) -> None:
    run_with(lambda plan: 1.0)
    kept = json.loads(own_cache.read_text())
    if damage == "other torch":
        kept["versions"]["torch"] = "1.0"
        damage = json.dumps(kept)
    elif damage == "strange entry":
        kept["entries"] = {key: {"speed": 3} for key in kept["entries"]}
        damage = json.dumps(kept)
    own_cache.write_text(damage)
    tuning.forget()
    assert tuning.tuned(*ARGS) is None


def test_a_cache_that_cannot_be_written_serves_the_process(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_cache.parent.write_text("a file where the folder should be")
    best = run_with(lambda plan: 1.0)
    assert tuning.tuned(*ARGS) == (best,)


def test_the_cost_models_choice_is_among_the_candidates() -> None:
    for tokens in (1, 16, 64):
        shape = replace(SHAPE, tokens=tokens)
        tried = tuning.candidates(shape, H200, 16, False)
        assert choose(shape, H200, 16) == tried[0] and None in tried and len(tried) == len(set(tried))


def test_one_block_of_all_steps_has_candidates_too() -> None:
    shape = Shape(lanes=1, depth=23, rank=16, hidden=2048, tokens=1)
    assert decode_plan(shape, H200, 23) in tuning.candidates(shape, H200, 23, False)
