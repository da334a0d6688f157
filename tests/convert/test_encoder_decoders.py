"""Encoder-decoders: their MLPs are ordinary ones, on two sides, and both sides read a text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny
from transformers import AutoModelForSeq2SeqLM

from dlr_lock import DLRError, convert_model, load
from dlr_lock.convert.data import english_topics
from dlr_lock.convert.evaluate import Evaluation, evaluate
from dlr_lock.convert.source import load_tokenizer
from dlr_lock.runtime.generation import generate

QUICK: dict[str, Any] = {
    "tokens": 2048, "heldout": 512, "train_tokens": 2048, "batch": 256, "depth": 3, "rank": 16, "redistill": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text(english_topics()[:40_000], encoding="utf-8")
    return path


@pytest.mark.parametrize("arch", ["t5", "bart"])
def test_an_encoder_decoder(arch: str, text: Path, tmp_path: Path) -> None:
    """Both sides' MLPs are locked, the decoder is measured by what it says, and it writes what the prompt leads to."""
    source = save_tiny(arch, tmp_path / "source")
    report = convert_model(source, tmp_path / "out", data=str(text), **QUICK | {"end_to_end": 1024})
    sides = ["encoder", "encoder", "decoder", "decoder"]
    assert [side for m, side in zip(report.modules, sides, strict=True) if side in m.module] == sides
    assert [m.layer for m in report.modules] == [0, 1, 2, 3] and report.across == "independent"
    assert isinstance(report.evaluation, Evaluation) and report.evaluation.kl is not None
    # its decoder, fed one token late, is judged by the token that it stands at
    original = AutoModelForSeq2SeqLM.from_pretrained(source)
    ids = torch.arange(3, 35)[None]
    late = torch.cat([torch.tensor([[original.config.decoder_start_token_id]]), ids[:, :-1]], 1)
    with torch.no_grad():
        said = original(input_ids=ids, decoder_input_ids=late).logits.log_softmax(-1)
    wanted = -said[0].gather(-1, ids[0][:, None])[1:].mean().item()
    assert evaluate(original, ids).loss == pytest.approx(wanted, rel=1e-5)

    locked, tokenizer = load(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    assert tokenizer is not None
    pieces: list[str] = []
    written = generate(locked, tokenizer, "The river", max_new_tokens=6, emit=pieces.append)
    output = locked.generate(**tokenizer("The river", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert written == "".join(pieces) == tokenizer.decode(output[0], skip_special_tokens=True)


def test_an_encoder_decoder_writes_no_text_of_its_own(tmp_path: Path) -> None:
    save_tiny("t5", tmp_path / "source")
    with pytest.raises(DLRError, match=r"writes nothing of its own accord: give it a text, --data text\.txt"):
        convert_model(tmp_path / "source", tmp_path / "out", **QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
