"""What several processes capture together is what one captures, bit for bit; and no more at once than they may hold."""

import weakref
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import Launched
from tiny import VOCABULARY, tiny_model

from dlr_lock.convert.activations import capture as capturing
from dlr_lock.convert.activations import pairs as keeping
from dlr_lock.convert.activations.capture import capture
from dlr_lock.convert.activations.dealt import at_once, capture_dealt, most_led, waves
from dlr_lock.convert.activations.pairs import Activations
from dlr_lock.convert.mlp_discovery import find_mlps
from dlr_lock.convert.parallel import share
from dlr_lock.convert.parallel.ranks import joined, leave

LENGTH, BATCH = 16, 9  # tokens of a sequence, sequences of a batch
WHOLE, SHORT = (
    31,
    13,
)  # sequences: three batches and one of four, so that the first process has two; and one and one
ALL = [[0, 3], [1, 4], [2]]
CASES = {  # hands, sequences, modules' worth of memory, and how many modules each wave has for each process
    "one wave": (ALL, WHOLE, 20, [[2, 2, 1]]),
    "two waves": (ALL, WHOLE, 3, [[1, 1, 1], [1, 1, 0]]),
    "files": (ALL, WHOLE, 2, [[1, 1, 1], [1, 1, 0]]),
    "nothing to fit": ([[4], [], [1, 2]], WHOLE, 20, [[1, 0, 2]]),
    "no text, one wave": (ALL, SHORT, 20, [[2, 2, 1]]),
    "no text, files": (ALL, SHORT, 2, [[1, 1, 1], [1, 1, 0]]),
}


def bytes_of(modules: int, sequences: int) -> int:
    """Of x and y."""
    return modules * sequences * LENGTH * 64 * 2 * 2


class Held:
    """Counts what `storage` gives in memory, until it is let go."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def storage(self, rows: int, width: int, dtype: torch.dtype, scratch: Path | None) -> torch.Tensor:
        made = storage(rows, width, dtype, scratch)
        if scratch is None:
            self._add(made.nbytes)
            weakref.finalize(made, self._add, -made.nbytes)
        return made

    def _add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


storage = keeping.storage


def captured_together(folder: Path, kind: str) -> None:
    """A process's part of each case, and the most that it held, written to a file."""
    ranks = joined()
    capturing.BATCH_TOKENS, share._ROWS = BATCH * LENGTH, 100
    model = tiny_model(kind, layers=5)
    mlps, found = find_mlps(model), {}
    exchange, sent = ranks.exchange, [0]

    def exchanged(rows: torch.Tensor, *counts: Any) -> torch.Tensor:
        sent.append(len(rows))
        return exchange(rows, *counts)

    ranks.exchange = exchanged
    for name, (hands, sequences, modules, _) in CASES.items():
        held = Held()
        keeping.storage = held.storage
        dealt, memory = [[mlps[number] for number in hand] for hand in hands], bytes_of(modules, sequences)
        each = capture_dealt(model, dealt, text(sequences), ranks, max_memory=memory, scratch=folder)
        sent.clear()
        got = [(mlp.module, copied(pairs), pairs.mapped) for mlp, pairs in each]
        found[name] = got, held.most, held.now, max(sent)
    leave()
    torch.save(found, folder / f"{ranks.rank}.pt")


def text(sequences: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (sequences, LENGTH), generator=torch.Generator().manual_seed(5))


def copied(pairs: Activations) -> list[torch.Tensor]:
    return [part.clone() for part in (pairs.x, pairs.y, pairs.first, *(pairs.routing or ()))]


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_it_is_what_one_process_captures(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Launched(3, captured_together, tmp_path, kind, log=tmp_path / "log")
    assert run.ended() == [0, 0, 0], run.said()
    monkeypatch.setattr(capturing, "BATCH_TOKENS", BATCH * LENGTH)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    model = tiny_model(kind, layers=5)
    mlps = find_mlps(model)
    truth: dict[int, Any] = {}
    for sequences in (WHOLE, SHORT):
        alone = capture(model, mlps, text(sequences), max_memory=10**9, scratch=tmp_path)
        truth[sequences] = {mlp.module: copied(pairs) for mlp, pairs in alone}
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for name, (hands, sequences, modules, _) in CASES.items():
        for hand, part in zip(hands, parts, strict=True):
            got, most, left, sent = part[name]
            assert sent < 3 * 100 or sequences == SHORT, name  # of 300 that all want, some from each process
            assert most <= bytes_of(modules, sequences) and left == 0, name
            assert [module for module, _, _ in got] == [mlps[number].module for number in hand]
            for module, ours, mapped in got:
                assert mapped == ("files" in name)
                assert len(ours) == len(truth[sequences][module]) == (5 if kind == "mixtral" else 3)
                for one, two in zip(ours, truth[sequences][module], strict=True):
                    assert torch.equal(one, two)


@pytest.mark.parametrize("name", CASES)
def test_a_wave_has_as_many_modules_as_there_is_room_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "BATCH_TOKENS", BATCH * LENGTH)
    numbers, sequences, modules, sizes = CASES[name]
    mlps = find_mlps(tiny_model("llama", layers=5))
    hands = [[mlps[number] for number in hand] for hand in numbers]
    tokens = sequences * LENGTH
    each = at_once(hands, tokens, most_led(tokens, LENGTH, 3), bytes_of(modules, sequences))
    made = waves(hands, each)
    assert [[len(hand) for hand in wave] for wave in made] == sizes and (each == 0) == ("files" in name)
    for rank, hand in enumerate(hands):
        assert list(chain.from_iterable(wave[rank] for wave in made)) == hand
