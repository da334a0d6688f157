"""A conversion as its users see it, on tiny random models of every shape of MLP."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, save_tiny, tiny_model, tiny_tokenizer
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForMaskedLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

import dlr_lock
from dlr_lock import DLRError, convert_model
from dlr_lock.convert import complete, evaluate_checkpoint
from dlr_lock.convert.data import english_topics, load_text
from dlr_lock.convert.evaluate import StateEvaluation
from dlr_lock.convert.layer_runner import LayerRunner, Unrepeatable
from dlr_lock.reporting.lock_verdict import Redistillation
from dlr_lock.runtime import locked_modules, verify

QUICK: dict[str, Any] = {
    "tokens": 2048,
    "heldout": 512,
    "train_tokens": 4096,
    "batch": 256,
    "depth": 3,
    "rank": 16,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text(english_topics()[:40_000], encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        ("llama", "float32"),
        ("gpt2", "float32"),
        ("opt", "bfloat16"),
        ("phi3", "bfloat16"),
        ("gemma2", "float32"),
    ],
)
def test_convert_load_generate(arch: str, dtype: str, text: Path, tmp_path: Path) -> None:
    save_tiny(arch, tmp_path / "source")
    report = convert_model(tmp_path / "source", tmp_path / "out", data=str(text), dtype=dtype, **QUICK)
    assert verify(tmp_path / "out") == []
    assert [m.layer for m in report.modules] == [0, 1] and report.mlps == 2
    assert report.params_locked - report.params_original == sum(
        m.spec.params - m.params_original for m in report.modules
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [name for name, _ in locked_modules(model)] == [m.module for m in report.modules]
    assert model.dtype == getattr(torch, dtype)
    output = model.generate(**tokenizer("The river", return_tensors="pt"), max_new_tokens=5, min_new_tokens=5)
    assert output.shape[1] >= 6
    evaluation = report.evaluation
    assert evaluation is not None and evaluation.kl is not None and math.isfinite(evaluation.loss)
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"{m.fidelity.rel_error:.4f}" in card for m in report.modules)
    assert ("NOT LOCKED" in card) == bool(report.not_locked)


def test_the_reported_error_is_the_checkpoints_own(text: Path, tmp_path: Path) -> None:
    """Worked out again from nothing but the two directories and the text."""
    save_tiny("llama", tmp_path / "source")
    report = convert_model(
        tmp_path / "source",
        tmp_path / "out",
        data=str(text),
        layers="1",
        **(QUICK | {"train_tokens": 20_000}),
    )
    assert [m.module for m in report.modules] == ["model.layers.1.mlp"]
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    locked = dlr_lock.load(tmp_path / "out")
    seen: list[torch.Tensor] = []
    original.model.layers[1].mlp.register_forward_hook(lambda m, args, y: seen.extend([args[0], y]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(text.read_text()[20_000:24_000], return_tensors="pt")["input_ids"][:, :512]
    with torch.no_grad():
        original(ids)
        got = locked.model.layers[1].mlp(seen[0])
    error = ((got - seen[1]).square().sum(-1) / seen[1].square().sum(-1)).mean().item()
    assert error == pytest.approx(report.modules[0].fidelity.rel_error, rel=0.25)  # other tokens, same text
    assert error < 0.9  # it has learnt something: the zero function has 1


def test_what_was_not_locked_is_bit_for_bit_the_original(text: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    convert_model(tmp_path / "source", tmp_path / "out", data=str(text), layers="0", **QUICK)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    kept = [name for name in before if "layers.0.mlp" not in name]
    assert len(kept) > 10 and all(torch.equal(before[name], after[name]) for name in kept)


def test_same_seed_same_checkpoint_and_no_paths_of_this_machine(text: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    for name in ("one", "two"):
        convert_model(tmp_path / "source", tmp_path / name, data=str(text), **QUICK)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    published = "".join(
        p.read_text() for p in (tmp_path / "one").glob("*.[jm][sd]*") if p.suffix != ".safetensors"
    )
    assert str(tmp_path) not in published


def test_a_budget_of_one_byte_spills_to_disk_and_changes_nothing(text: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    for name, budget in (("roomy", None), ("tight", 1)):
        convert_model(tmp_path / "source", tmp_path / name, data=str(text), max_memory=budget, **QUICK)
    roomy, tight = (load_file(tmp_path / name / "model.safetensors") for name in ("roomy", "tight"))
    assert all(torch.equal(roomy[name], tight[name]) for name in roomy)


def test_no_text_is_needed(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    options = QUICK | {"tokens": 512, "heldout": 256, "train_tokens": 1024}
    report = convert_model(tmp_path / "source", tmp_path / "out", layers="0", **options)
    assert "sampled from the model itself" in report.options["data"]


def test_an_encoder_without_a_language_model_head(text: Path, tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "source")
    report = convert_model(tmp_path / "source", tmp_path / "out", data=str(text), **QUICK)
    assert isinstance(report.evaluation, StateEvaluation) and len(report.modules) == 2
    original, locked = AutoModel.from_pretrained(tmp_path / "source"), dlr_lock.load(tmp_path / "out")
    ids = torch.randint(0, VOCABULARY, (4, 64))
    with torch.no_grad():
        ours, theirs = (m(ids)[0] for m in (locked, original))
    error = ((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean().item()
    assert error == pytest.approx(report.evaluation.state_error, rel=0.5)  # random tokens, not text
    assert f"{report.evaluation.cosine:.4f}" in (tmp_path / "out" / "README.md").read_text()
    assert len(locked_modules(dlr_lock.load(tmp_path / "out"))) == 2


def test_all_that_a_conversion_can_measure_stands_in_the_card(text: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source", layers=3)
    options = QUICK | {
        "train_tokens": 8192,
        "rank": None,
        "params": 1.5,
        "layers": "last-2",
        "redistill": 0.5,
    }
    report = convert_model(tmp_path / "source", tmp_path / "out", data=str(text), end_to_end=4096, **options)
    assert [m.layer for m in report.modules] == [1, 2] and report.across == "sequential"
    card = (tmp_path / "out" / "README.md").read_text()
    for m in report.modules:
        assert m.spec.params == pytest.approx(1.5 * m.params_original, rel=0.15)
        assert (
            m.redistillation is not None
            and m.redistillation.cost == 0.5
            and m.redistillation.train_tokens == 4096
        )
        assert f"| {m.judgement} |" in card and f"{m.drift:.4f}" in card
    assert report.end_to_end is not None
    before, after = report.end_to_end.evaluation_before, report.end_to_end.evaluation_after
    assert after.kl is not None and after.kl < before.kl  # trained on just that
    assert after.kl == pytest.approx(report.evaluation.kl, rel=1e-3)
    attacks = report.end_to_end.redistillation_before, report.end_to_end.redistillation_after
    assert all(a is not None and a.train_tokens == 4096 and str(a) in card for a in attacks)
    assert f"{before.loss:.4f}" in card and f"{report.end_to_end.smallest_gap_after:.2f}" in card


def test_text_that_repeats_itself_is_warned_of(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    (tmp_path / "dull.txt").write_text("All work and no play makes Jack a dull boy. " * 1000)
    report = convert_model(tmp_path / "source", tmp_path / "out", data=str(tmp_path / "dull.txt"), **QUICK)
    assert any("repeats itself" in warning for warning in report.warnings)
    assert "repeats itself" in (tmp_path / "out" / "README.md").read_text()


def test_where_layers_cannot_be_run_alone_modules_are_independent_and_that_is_said(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path / "source")

    def refuse(*args: object) -> None:
        raise Unrepeatable("its layers dance")

    monkeypatch.setattr(LayerRunner, "_check", refuse)
    report = convert_model(tmp_path / "source", tmp_path / "out", data=str(text), **QUICK)
    assert report.across == "independent" and "dance" in report.warnings[0]
    assert all(m.drift is None for m in report.modules)
    with pytest.raises(DLRError, match="dance"):
        convert_model(tmp_path / "source", tmp_path / "no", data=str(text), across="sequential", **QUICK)


def test_an_end_to_end_phase_has_text_that_modules_have_not_seen(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []

    def stop(
        model: Any, chains: dict, identity: list[str], tokens: torch.Tensor, *args: Any, **named: Any
    ) -> dict:
        drawn.append(tokens)
        raise DLRError("enough is seen")

    source = save_tiny("llama", tmp_path / "source", layers=1)
    monkeypatch.setattr("dlr_lock.convert.end_to_end.train_end_to_end", stop)
    convert_model(source, tmp_path / "out", data=str(text), end_to_end=512, **QUICK)
    (seen,) = drawn
    own = {"tokens": QUICK["tokens"], "heldout_tokens": QUICK["heldout"], "sequence_length": seen.shape[1]}
    behind = load_text(text, tiny_tokenizer(), behind=512, **own).behind
    assert len(behind) and torch.equal(seen, behind)


def test_an_end_to_end_phase_that_spoils_the_lock_is_dropped(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path / "source")

    def spoiled(model: Any, chains: dict, *args: Any, **named: Any) -> dict:
        worse = copy.deepcopy(chains)
        for net in worse.values():
            net.dlr_B.data.mul_(1e-3)
        return worse

    convert_model(tmp_path / "source", tmp_path / "without", data=str(text), end_to_end=0, **QUICK)
    monkeypatch.setattr("dlr_lock.convert.end_to_end.train_end_to_end", spoiled)
    report = convert_model(tmp_path / "source", tmp_path / "out", data=str(text), end_to_end=512, **QUICK)
    assert report.end_to_end is None and any("dropped" in warning for warning in report.warnings)
    kept, without = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "without"))
    assert all(torch.equal(kept[name], without[name]) for name in kept)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ((0.05, 3.0), (0.05, 0.06), "unlocked model.layers.1.mlp: its flatten gap was 3.000, then 0.060"),
        ((0.55, 3.0), (0.54, 0.49), "unlocked model.layers.1.mlp"),
        ((0.51, 3.0), (0.49, 3.0), "unlocked model.layers.0.mlp"),
        ((0.9, 3.0), (0.8, 3.0), "lowered the smallest flatten gap: 0.900, then 0.800"),
        ((0.05, 3.0), (0.04, 3.0), "lowered the smallest flatten gap"),
        ((0.05, 3.0), (0.049, 0.6), None),
        ((0.6, 3.0), (0.58, 1.0), None),
    ],
)
def test_an_end_to_end_phase_that_unlocks_any_module_is_dropped(
    before: tuple[float, float],
    after: tuple[float, float],
    says: str | None,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_tiny("llama", tmp_path / "source")
    names = ("model.layers.0.mlp", "model.layers.1.mlp")
    gaps = iter([dict(zip(names, values, strict=True)) for values in (before, after)])
    phase = convert_model.__globals__["run_end_to_end"].__globals__
    monkeypatch.setitem(phase, "flatten_gaps", lambda *args: next(gaps))
    monkeypatch.setitem(phase, "train_end_to_end", lambda model, chains, *args, **named: dict(chains))
    report = convert_model(
        tmp_path / "source",
        tmp_path / "out",
        data=str(text),
        **QUICK | {"train_tokens": 512, "end_to_end": 512},
    )
    assert (report.end_to_end is None) == (says is not None)
    assert says is None or any(says in warning for warning in report.warnings)


@pytest.mark.parametrize("error", [0.3, 0.2], ids=["held", "undone before"])
def test_an_end_to_end_phase_that_makes_undoing_cheaper_is_dropped(
    error: float, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where there is nothing to undo any more: what students of such a chain end at is chance."""
    save_tiny("llama", tmp_path / "source")
    errors = iter((0.05, 0.04))
    phase = convert_model.__globals__["run_end_to_end"].__globals__
    monkeypatch.setitem(
        phase,
        "attack_module",
        lambda *args, **named: Redistillation(512, 1024, error, 0.2, student_error=next(errors)),
    )
    monkeypatch.setitem(phase, "train_end_to_end", lambda model, chains, *args, **named: dict(chains))
    report = convert_model(
        tmp_path / "source", tmp_path / "out", data=str(text), **QUICK | {"end_to_end": 512, "redistill": 0.5}
    )
    dropped = any("easier to undo: a student's error was 0.0500, then 0.0400" in w for w in report.warnings)
    assert dropped == (report.end_to_end is None) == (error == 0.3)


def test_a_chain_that_is_undone_after_the_end_to_end_phase_is_not_called_locked(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weakest module held before the phase, by its own target; the attack around the phase undoes it, and the
    verdict is on the chain that is written."""
    save_tiny("llama", tmp_path / "source")
    held, undone = (Redistillation(512, 1024, error, 0.2, 0.05) for error in (0.3, 0.2))
    pipeline = convert_model.__globals__
    phase = pipeline["run_end_to_end"].__globals__
    monkeypatch.setitem(pipeline, "attack_module", lambda *args, **named: held)
    monkeypatch.setitem(phase, "attack_module", lambda *args, **named: undone)
    monkeypatch.setitem(phase, "train_end_to_end", lambda model, chains, *args, **named: dict(chains))
    report = convert_model(
        tmp_path / "source", tmp_path / "out", data=str(text), **QUICK | {"end_to_end": 512, "redistill": 0.5}
    )
    assert report.end_to_end is not None
    attacks = {m.module: m.redistillation for m in report.modules}
    assert attacks.pop(report.end_to_end.weakest) == undone and set(map(str, attacks.values())) == {str(held)}


@pytest.mark.parametrize(
    ("kind", "name"), [(PreTrainedTokenizerBase, "Tokenizer"), (PreTrainedConfig, "LlamaConfig")]
)
def test_what_cannot_be_saved_is_said_before_the_work(
    kind: type, name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tokenizers cannot write their vocabulary, and some configs cannot be JSON."""
    save_tiny("llama", tmp_path / "source")

    def refused(*args: Any, **options: Any) -> None:
        raise ValueError("this one cannot")

    monkeypatch.setattr(kind, "save_pretrained", refused)
    said: list[str] = []
    with pytest.raises(DLRError, match=f"the .*{name}.* of .*source cannot be saved: this one cannot"):
        convert_model(
            tmp_path / "source",
            tmp_path / "out",
            data=str(text),
            progress=lambda what, *_: said.append(what),
            **QUICK,
        )
    assert set(said) == {"reading the model"} and not (tmp_path / "out").exists()


def test_lost_first_tokens_are_said(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the fit has hardly begun, first tokens are as wrong as all others."""
    save_tiny("llama", tmp_path / "source")
    report = convert_model(
        tmp_path / "source", tmp_path / "out", data=str(text), **QUICK | {"train_tokens": 256}
    )
    for module in report.modules:
        assert (module.fidelity.first_error or 0) > 0.5
        assert any(note.startswith(f"{module.module} misses the first tokens") for note in report.warnings)


def test_modules_behind_a_norm_are_said_to_correct_nothing(text: Path, tmp_path: Path) -> None:
    save_tiny("gemma2", tmp_path / "source")
    report = convert_model(tmp_path / "source", tmp_path / "out", data=str(text), **QUICK)
    assert any("2 of 2 modules" in warning for warning in report.warnings)


def test_a_masked_language_model_has_no_next_token(text: Path, tmp_path: Path) -> None:
    model = BertForMaskedLM(tiny_model("bert").config)
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    report = convert_model(tmp_path / "source", tmp_path / "out", data=str(text), end_to_end=512, **QUICK)
    assert isinstance(report.evaluation, StateEvaluation)
    assert "AutoModelForCausalLM" not in (tmp_path / "out" / "README.md").read_text()


def test_an_mlp_whose_inside_is_unknown_starts_at_random_and_says_so(text: Path, tmp_path: Path) -> None:
    save_tiny("bitnet", tmp_path / "source")  # a norm inside the MLP
    report = convert_model(tmp_path / "source", tmp_path / "out", data=str(text), **QUICK)
    note = "the inside of model.layers.0.mlp, model.layers.1.mlp is unknown: a chain in its place started at random"
    assert [warning.startswith(note) for warning in report.warnings].count(True) == 1
    assert note in (tmp_path / "out" / "README.md").read_text()


def test_chains_start_at_what_the_mlp_reads_unless_told_otherwise(text: Path, tmp_path: Path) -> None:
    """After one batch a chain is still near its start."""
    save_tiny("llama", tmp_path / "source")
    near = []
    for start in ({}, {"init": "mixed"}, {"init": "random"}):
        out = tmp_path / f"out{len(near)}"
        options = QUICK | {"train_tokens": 256, "layers": "1", "depth": None, "rank": None}
        convert_model(tmp_path / "source", out, data=str(text), **options | start)
        weights = load_file(tmp_path / "source" / "model.safetensors")
        gate, up = (weights[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
        reads = load_file(out / "model.safetensors")["model.layers.1.mlp.dlr_A"].flatten(0, -2).float()
        cosines = functional.normalize(reads) @ functional.normalize(torch.cat([gate + up, gate - up])).T
        near.append(cosines.abs().amax(1).median().item())
    assert near[0] == near[1] > 0.95 and near[2] < 0.8


def test_a_dense_layer_beside_mixtures_is_locked_alone_where_it_is_named(text: Path, tmp_path: Path) -> None:
    save_tiny("deepseek_v3", tmp_path / "source", layers=3)
    report = convert_model(tmp_path / "source", tmp_path / "out", data=str(text), layers="0", **QUICK)
    # layer 0 is dense; in 1 and 2 are a mixture and a shared expert each
    assert ([m.layer for m in report.modules], report.mlps) == ([0], 5)
    assert "1 of the 5 MLPs of this model are DLR-Nets" in (tmp_path / "out" / "README.md").read_text()


def test_a_tokenizer_with_more_tokens_than_the_embedding(tmp_path: Path) -> None:
    """It is refused where the text has such a token; those of Gemma 3's text models have one that no text has."""
    save_tiny("llama", tmp_path / "source")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["river", "Zarathustra"])
    tokenizer.save_pretrained(tmp_path / "source")
    (tmp_path / "river.txt").write_text("Down the river to the sea. " * 2000)
    (tmp_path / "sea.txt").write_text("Down the mountain to the sea. " * 2000)
    with pytest.raises(DLRError, match=r"token 320 \('river'\), the model's embedding has 320 rows"):
        convert_model(tmp_path / "source", tmp_path / "out", data=str(tmp_path / "river.txt"), **QUICK)
    assert not (tmp_path / "out").exists()
    convert_model(tmp_path / "source", tmp_path / "out", data=str(tmp_path / "sea.txt"), **QUICK)
    with pytest.raises(DLRError, match=r"token 321 \('Zarathustra'\)"):
        complete(tmp_path / "out", "Thus spoke Zarathustra")
    with pytest.raises(DLRError, match="token 320"):
        evaluate_checkpoint(tmp_path / "out", tmp_path / "river.txt", tokens=512)


def spoil(source: Path, value: float) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers": "7"}, "7"),
        ({"layers": "x"}, "x"),
        ({"rank": 24}, "multiple of 16"),
        ({"act": "nope"}, "nope"),
        ({"init": "warm"}, "warm"),
        ({"dtype": "int3"}, "int3"),
        ({"device": "warp:9"}, "warp"),
        ({"train_tokens": 10}, "batch"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": 10**9}, "wanted"),
        ({"max_memory": "lots"}, "lots"),
        ({"data": "missing.txt"}, r"missing\.txt"),
        ({"mlps": "("}, r"\("),
        ({"effort": "heroic"}, "heroic"),
        ({"across": "sideways"}, "sideways"),
        ({"params": 0.0}, "params"),
        ({"end_to_end": -1}, "end-to-end"),
        ({"redistill": -0.5}, "redistill"),
        ({"sequence": 0}, "sequence"),
        ({"layers": "last-3"}, "MLPs in 2 layers"),
        ({"sequence": 10**6}, "takes at most"),
    ],
)
def test_bad_arguments_leave_nothing_behind(change: dict, says: str, text: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    with pytest.raises(DLRError, match=says) as caught:
        convert_model(tmp_path / "source", tmp_path / "out", **({"data": str(text)} | QUICK | change))
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_weights_are_named(value: float, text: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    spoil(tmp_path / "source", value)
    with pytest.raises(DLRError, match=r"layers\.1\.mlp\.up_proj"):
        convert_model(tmp_path / "source", tmp_path / "out", data=str(text), **QUICK)


def test_a_locked_model_cannot_be_locked_again(text: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    convert_model(tmp_path / "source", tmp_path / "out", data=str(text), **QUICK)
    with pytest.raises(DLRError, match="already locked"):
        convert_model(tmp_path / "out", tmp_path / "again", data=str(text), **QUICK)
    with pytest.raises(DLRError, match="exists"):
        convert_model(tmp_path / "source", tmp_path / "out", data=str(text), **QUICK)
    convert_model(tmp_path / "source", tmp_path / "out", data=str(text), overwrite=True, **QUICK)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_nothing(number: int, text: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    command = [sys.executable, "-m", "dlr_lock", "convert", str(tmp_path / "source"), str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--data", str(text), "--tokens", "2048", "--train-tokens", str(10**9)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # a suite that was started in the background has SIGINT ignored, and hands that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stderr is not None
        deadline = time.monotonic() + 120
        for line in process.stderr:
            if line.startswith("distilling"):
                break
            assert time.monotonic() < deadline
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2
    assert errors.strip().splitlines()[-1] == "dlr-lock: interrupted; nothing was written"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_the_manifest_carries_the_report(text: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    report = convert_model(tmp_path / "source", tmp_path / "out", data=str(text), **QUICK)
    facts = json.loads((tmp_path / "out" / "dlr_manifest.json").read_text())["conversion"]
    assert facts["modules"] == [m.to_dict() for m in report.modules]
    assert len(facts["fingerprint"]) == 64


def test_going_on_with_another_share_makes_that_attack(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path / "source")

    def stopped(*args: Any) -> int:
        raise KeyboardInterrupt

    choices = QUICK | {"data": str(text), "layers": "0", "train_tokens": 1024}
    with monkeypatch.context() as patched:
        patched.setitem(convert_model.__globals__, "write_checkpoint", stopped)
        with pytest.raises(KeyboardInterrupt, match="1 finished part"):
            convert_model(tmp_path / "source", tmp_path / "out", redistill=0.25, **choices)
    report = convert_model(tmp_path / "source", tmp_path / "out", redistill=0.5, **choices)
    assert [m.redistillation and m.redistillation.train_tokens for m in report.modules] == [512]
