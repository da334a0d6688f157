"""The bundled task and the user's text, split for an audit."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_tokenizer

from dlr_lock import DLRError
from dlr_lock.audit.texts import invented_lines, read_split


def test_the_invented_language_is_a_language() -> None:
    lines = list(invented_lines(20_000, 0))
    assert lines == list(invented_lines(20_000, 0)) != list(invented_lines(20_000, 1))
    assert sum(len(line) + 1 for line in lines) >= 20_000 and len(set(lines)) > 0.99 * len(lines)
    words: dict[str, str] = {}
    for line in lines:
        english, own = line.split(" = ")
        _, how, who, does, _, what, _, _, _where = english.rstrip(".").split()
        noun, adjective, _, thing, verb = own.rstrip(".").split()
        assert adjective[-1] == noun[-1]  # the rule that is to be learnt
        for key, word in ((who, noun.lower()), (how, adjective[:-1]), (what, thing), (does, verb)):
            assert words.setdefault(key, word) == word
    assert len(set(words.values())) == len(words) == 40


def test_a_split_has_no_sequence_on_both_sides() -> None:
    text = read_split("invented", tiny_tokenizer(), tokens=4_000, heldout_tokens=600, sequence_length=32)
    assert text.train.shape[1] == text.heldout.shape[1] and len(text.train) * text.train.shape[1] <= 4_000
    rows = torch.cat([text.train, text.heldout])
    assert len(torch.unique(rows, dim=0)) == len(rows)


def test_a_short_text_is_used_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("\n".join(invented_lines(3_000, 2)), encoding="utf-8")
    text = read_split(str(path), tiny_tokenizer(), tokens=10**6, heldout_tokens=10**5, sequence_length=32)
    assert text.source == "short.txt" and len(text.train) >= 6 * len(text.heldout) > 0
    path.write_text("Hello.", encoding="utf-8")
    with pytest.raises(DLRError, match=r"short\.txt: .* less than two sequences"):
        read_split(str(path), tiny_tokenizer(), tokens=10**6, heldout_tokens=10**5, sequence_length=32)
    with pytest.raises(DLRError):
        read_split(
            str(tmp_path / "none.txt"), tiny_tokenizer(), tokens=9, heldout_tokens=9, sequence_length=8
        )
