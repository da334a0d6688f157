"""What several processes capture together is what one captures, bit for bit."""

from itertools import chain
from pathlib import Path

import pytest
import torch
from launched import Launched
from tiny import VOCABULARY, tiny_model

from dlr_lock.convert.activations import capture as capturing
from dlr_lock.convert.activations.capture import capture
from dlr_lock.convert.activations.dealt import capture_dealt, waves
from dlr_lock.convert.activations.pairs import Activations
from dlr_lock.convert.mlp_discovery import find_mlps
from dlr_lock.convert.parallel import share
from dlr_lock.convert.parallel.ranks import joined, leave

LENGTH, SEQUENCES = 16, 22  # two whole batches of nine and one of four
MODULE = SEQUENCES * LENGTH * 64 * 2 * 2  # bytes of one module's x and y
CASES = {  # hands, bytes of memory, and how many modules each wave has for each process
    "one wave": ([[0, 3], [1, 4], [2]], 10**9, [[2, 2, 1]]),
    "two waves": ([[0, 3], [1, 4], [2]], 2 * MODULE, [[1, 1, 1], [1, 1, 0]]),
    "files": ([[0, 3], [1, 4], [2]], MODULE, [[1, 1, 1], [1, 1, 0]]),
    "nothing to fit": ([[4], [], [1, 2]], 10**9, [[1, 0, 2]]),
}


def captured_together(folder: Path, kind: str) -> None:
    """A process's part of each case, written to a file."""
    ranks = joined()
    capturing.BATCH_TOKENS, share._ROWS = 9 * LENGTH, 100
    model = tiny_model(kind, layers=5)
    mlps, found = find_mlps(model), {}
    for name, (hands, memory, _) in CASES.items():
        dealt = [[mlps[number] for number in hand] for hand in hands]
        each = capture_dealt(model, dealt, text(), ranks, max_memory=memory, scratch=folder)
        found[name] = [(mlp.module, copied(pairs), pairs.mapped) for mlp, pairs in each]
    leave()
    torch.save(found, folder / f"{ranks.rank}.pt")


def text() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(5))


def copied(pairs: Activations) -> list[torch.Tensor]:
    return [part.clone() for part in (pairs.x, pairs.y, pairs.first, *(pairs.routing or ()))]


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_it_is_what_one_process_captures(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Launched(3, captured_together, tmp_path, kind, log=tmp_path / "log")
    assert run.ended() == [0, 0, 0], run.said()
    monkeypatch.setattr(capturing, "BATCH_TOKENS", 9 * LENGTH)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    model = tiny_model(kind, layers=5)
    mlps = find_mlps(model)
    alone = capture(model, mlps, text(), max_memory=10**9, scratch=tmp_path)
    truth = {mlp.module: copied(pairs) for mlp, pairs in alone}
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for name, (hands, _, _) in CASES.items():
        for hand, part in zip(hands, parts, strict=True):
            assert [module for module, _, _ in part[name]] == [mlps[number].module for number in hand]
            for module, ours, mapped in part[name]:
                assert mapped == (name == "files")
                assert len(ours) == len(truth[module]) == (5 if kind == "mixtral" else 3)
                for one, two in zip(ours, truth[module], strict=True):
                    assert torch.equal(one, two)


@pytest.mark.parametrize("name", CASES)
def test_a_process_holds_its_room_at_most(name: str) -> None:
    """Its own modules of a wave, and of another what is on its way."""
    hands, memory, sizes = CASES[name]
    mlps = find_mlps(tiny_model("llama", layers=5))
    made = waves([[mlps[number] for number in hand] for hand in hands], SEQUENCES * LENGTH, memory)
    assert [[len(hand) for hand in wave] for wave in made] == sizes
    for rank, hand in enumerate(hands):
        assert list(chain.from_iterable(wave[rank] for wave in made)) == [mlps[number] for number in hand]
    assert name == "files" or max(map(len, chain.from_iterable(made))) + 1 <= memory / MODULE
