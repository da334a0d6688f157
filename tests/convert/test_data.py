"""Calibration text, with a real tokenizer and a real (tiny, random) model."""

import json
import logging
from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, tiny_model, tiny_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from dlr_lock.common.errors import DLRError
from dlr_lock.convert.data import english_topics, load_text


def make_tokenizer(bos=True, adds_bos=False, eos=True):
    """The tiny tokenizer (which puts no BOS in front of a text) in other moods, and for short texts."""
    backend = tiny_tokenizer().backend_tokenizer
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    special = ({"bos_token": "<s>"} if bos else {}) | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    """Wide enough weights that its distribution is far from even."""
    return tiny_model("llama", initializer_range=0.5)


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(english_topics(), encoding="utf-8")
    return path


def interleave(text):
    """Train and held-out sequences in the order of the text: one held out in the middle of each stretch."""
    total, heldout = len(text.train) + len(text.heldout), len(text.heldout)
    places = {(2 * i + 1) * total // (2 * heldout) for i in range(heldout)}
    train, held = iter(text.train), iter(text.heldout)
    return torch.stack([next(held) if i in places else next(train) for i in range(total)])


def test_txt_is_packed_without_a_gap(prose, tokenizer):
    text = load_text(prose, tokenizer, tokens=3200, heldout_tokens=320, sequence_length=64)
    assert text.train.shape == (50, 64) and text.heldout.shape == (5, 64)
    assert text.train.dtype == text.heldout.dtype == torch.int64
    assert text.source == "prose.txt"  # a folder of the owner's machine has no place in a model card
    read = tokenizer.decode(interleave(text).flatten())
    assert english_topics().startswith(read) and len(read) > 4000


def test_whole_sequences_only_and_always_something_held_out(prose, tokenizer):
    text = load_text(prose, tokenizer, tokens=1000, heldout_tokens=10, sequence_length=64)
    assert text.train.shape == (15, 64) and text.heldout.shape == (1, 64)


def test_heldout_is_spread_over_the_text(prose, tokenizer):
    text = load_text(prose, tokenizer, tokens=64 * 90, heldout_tokens=64 * 10, sequence_length=64)
    whole = load_text(prose, tokenizer, tokens=64 * 99, heldout_tokens=64, sequence_length=64)
    order = {tuple(row.tolist()): place for place, row in enumerate(interleave(whole))}
    places = [order[tuple(row.tolist())] for row in text.heldout]
    assert places == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]
    assert not {tuple(row.tolist()) for row in text.train} & {tuple(row.tolist()) for row in text.heldout}


def test_what_is_behind_is_none_of_either_and_comes_first(prose, tokenizer):
    """What modules are fitted and measured on is the same, whatever else is read; there may be less than is wanted."""
    plain = load_text(prose, tokenizer, tokens=320, heldout_tokens=64, sequence_length=32)
    more = load_text(prose, tokenizer, tokens=320, heldout_tokens=64, sequence_length=32, behind=100)
    whole = load_text(prose, tokenizer, tokens=320, heldout_tokens=64, sequence_length=32, behind=10**9)
    for text in (more, whole):
        assert torch.equal(text.train, plain.train) and torch.equal(text.heldout, plain.heldout)
    assert len(plain.behind) == 0 and len(more.behind) == 3 < len(whole.behind)
    assert torch.equal(whole.behind[:3], more.behind)
    read = torch.cat([interleave(whole), whole.behind]).flatten()
    assert english_topics().startswith(tokenizer.decode(read[:8000])) and len(read) > 8000
    assert torch.equal(more.unseen(64), more.behind[:2]) and torch.equal(more.unseen(90), more.behind)
    assert torch.equal(more.unseen(32 * 8), torch.cat([more.behind, more.train[::2]]))
    assert torch.equal(more.unseen(10**9), torch.cat([more.behind, more.train]))
    assert torch.equal(plain.unseen(32), plain.train[::10])


def test_reading_stops_when_there_is_enough(tmp_path, tokenizer):
    path = tmp_path / "long.jsonl"
    rows = [json.dumps({"text": "many words " * 50})] * 20
    path.write_text("\n".join([*rows, "{ broken"]))
    load_text(path, tokenizer, tokens=640, heldout_tokens=64, sequence_length=64)
    with pytest.raises(DLRError, match="line 21"):
        load_text(path, tokenizer, tokens=640_000, heldout_tokens=64, sequence_length=64)


def test_a_long_line_is_neither_read_nor_tokenized_whole(tmp_path, tokenizer):
    path = tmp_path / "long.txt"
    path.write_bytes(b"words and " * 60_000 + b"\xff")  # reading to the end would be an error
    seen = []
    load_text(
        path,
        tokenizer,
        tokens=640,
        heldout_tokens=64,
        sequence_length=64,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(704, 704)]
    with pytest.raises(DLRError, match="not UTF-8"):
        load_text(path, tokenizer, tokens=10_000_000, sequence_length=64)


@pytest.mark.parametrize("gap", [" ", "\n"])
def test_reading_in_pieces_leaves_words_whole(tmp_path, tokenizer, gap):
    path = tmp_path / "words.txt"
    path.write_text(gap.join(["internationalisation"] * 8000))
    ids = tokenizer(path.read_text(), verbose=False)["input_ids"]
    total = len(ids) // 64
    text = load_text(path, tokenizer, tokens=(total - 10) * 64, heldout_tokens=640, sequence_length=64)
    assert interleave(text).flatten().tolist() == ids[: total * 64]


def test_documents_are_joined_with_eos(tmp_path, tokenizer):
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": word}) for word in ["one two", "", "three"] * 9))
    text = load_text(path, tokenizer, tokens=32, heldout_tokens=8, sequence_length=8)
    read = tokenizer.decode(interleave(text).flatten())
    assert "one two</s>three</s>one two</s>three" in read and "</s></s>" not in read
    text = load_text(path, make_tokenizer(eos=False), tokens=32, heldout_tokens=8, sequence_length=8)
    assert "one twothreeone two" in tokenizer.decode(interleave(text).flatten())


def test_bos_starts_a_sequence_only_where_the_tokenizer_adds_it(prose, tokenizer):
    plain = load_text(prose, tokenizer, tokens=640, heldout_tokens=64, sequence_length=64)
    assert not (plain.train == tokenizer.bos_token_id).any()
    text = load_text(prose, make_tokenizer(adds_bos=True), tokens=640, heldout_tokens=64, sequence_length=64)
    sequences = interleave(text)
    assert (sequences[:, 0] == tokenizer.bos_token_id).all()
    assert not (sequences[:, 1:] == tokenizer.bos_token_id).any()
    assert english_topics().startswith(tokenizer.decode(sequences[:, 1:].flatten()))


def test_no_warning_about_long_texts(prose, caplog):
    tokenizer = make_tokenizer()  # a fresh one: the warning comes once a tokenizer
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        load_text(prose, tokenizer, tokens=640, heldout_tokens=64, sequence_length=64)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records


def test_every_kind_of_file_gives_the_same_tokens(tmp_path, tokenizer):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    documents = [chunk for chunk in english_topics()[:20_000].split("\n\n") if chunk.strip()]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d, "url": "x"}) for d in documents))
    (tmp_path / "b.jsonl").write_text("\n\n".join(json.dumps({"body": d, "n": 3}) for d in documents))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(d) for d in documents), encoding="utf-8-sig")
    pq.write_table(pa.table({"id": range(len(documents)), "text": documents}), tmp_path / "d.parquet")
    large = pa.array([*documents, None], pa.large_string())
    pq.write_table(pa.table({"n": range(len(documents) + 1), "words": large}), tmp_path / "e.parquet")
    texts = [
        load_text(tmp_path / name, tokenizer, tokens=6400, heldout_tokens=640, sequence_length=64)
        for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.parquet", "e.parquet")
    ]
    for text in texts[1:]:
        assert torch.equal(text.train, texts[0].train) and torch.equal(text.heldout, texts[0].heldout)


def test_half_a_surrogate_pair_is_survived(tmp_path, tokenizer):
    path = tmp_path / "cut.jsonl"
    path.write_text('{"text": "cut in the middle \\ud83d"}\n' * 40)
    assert len(load_text(path, tokenizer, tokens=128, heldout_tokens=16, sequence_length=16).train) == 8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("missing.jsonl", None, "no such file"),
        ("missing.parquet", None, "no such file"),
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\t\n" * 50, "empty"),
        ("empty.jsonl", b"\n\n", "empty"),
        ("latin.txt", "caf\u00e9 ".encode("latin-1") * 100, "not UTF-8"),
        ("latin.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}', "line 2 is not UTF-8"),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": ', "line 2 is not JSON"),
        ("deep.jsonl", b"[" * 200_000, "line 1 is not JSON"),
        ("number.jsonl", b'{"text": "fine"}\n\n17', "line 3 is not an object"),
        ("ambiguous.jsonl", b'{"title": "a", "body": "b"}', "line 1.*title, body"),
        ("mistyped.jsonl", b'{"text": 3, "url": "b"}', "line 1.*text, url"),
        ("broken.parquet", b"PAR1 and then nothing of the kind", "cannot be read"),
        ("words.docx", b"words", r"\.txt, \.jsonl, \.parquet"),
    ],
)
def test_unreadable_files_end_in_one_line(tmp_path, tokenizer, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DLRError, match=message) as caught:
        load_text(str(path), tokenizer, tokens=640, heldout_tokens=64, sequence_length=64)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_to_the_end(tmp_path, tokenizer):
    """/proc/self/mem opens and then fails to read, as a dying disk does (permissions do not stop root)."""
    if not Path("/proc/self/mem").exists():
        pytest.skip("needs /proc")
    for suffix in (".txt", ".jsonl", ".parquet"):
        path = tmp_path / f"dying{suffix}"
        path.symlink_to("/proc/self/mem")
        with pytest.raises(DLRError, match="cannot be read"):
            load_text(path, tokenizer, tokens=640, heldout_tokens=64, sequence_length=64)


def test_a_folder_is_not_text(tmp_path, tokenizer):
    with pytest.raises(DLRError, match="is a folder"):
        load_text(tmp_path, tokenizer, tokens=640, sequence_length=64)


def test_parquet_column_must_be_clear(tmp_path, tokenizer):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"title": ["a"], "body": ["b"]}), tmp_path / "two.parquet")
    with pytest.raises(DLRError, match=r"two.parquet.*title, body"):
        load_text(tmp_path / "two.parquet", tokenizer, tokens=640, sequence_length=64)


def test_too_little_text_says_how_much_there_is(tmp_path, tokenizer):
    path = tmp_path / "short.txt"
    path.write_text("word")
    count = len(tokenizer("word")["input_ids"])
    with pytest.raises(DLRError) as caught:
        load_text(path, tokenizer, tokens=163_840)
    message = str(caught.value)
    assert f"short.txt has {count} tokens" in message and "174,080 are wanted" in message
    assert "--tokens" in message and "--data self" in message


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DLRError, match=r"pip install 'dlr-lock\[data\]'"):
        load_text(tmp_path / "a.parquet", tokenizer, tokens=640, sequence_length=64)


def test_dataset_without_datasets_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DLRError, match=r"no-such/corpus.*pip install 'dlr-lock\[data\]'"):
        load_text("no-such/corpus", tokenizer, tokens=640, sequence_length=64)


def test_dataset_split_is_read(tmp_path, tokenizer, monkeypatch):
    """A real dataset, which `datasets` finds in a folder: its splits hold different words."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for split, word in (("train", "wheat"), ("validation", "chaff")):
        (corpus / f"{split}.jsonl").write_text(f'{{"text": "{word}", "n": 1}}\n' * 200)
    for name, word in (("train", "wheat"), ("validation", "chaff"), ("default:validation", "chaff")):
        text = load_text(f"{corpus}:{name}", tokenizer, tokens=64, heldout_tokens=16, sequence_length=16)
        assert set(tokenizer.decode(interleave(text).flatten()).split("</s>")[1:-1]) == {word}
    with pytest.raises(DLRError, match="neither a file nor a dataset"):
        load_text(f"{corpus}:no-such-split", tokenizer, tokens=64, sequence_length=16)
    with pytest.raises(DLRError, match="are wanted"):
        load_text(f"{corpus}:train", tokenizer, tokens=64_000, sequence_length=16)


def test_dataset_that_cannot_be_had(tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in ("no-such/corpus", "no-such/corpus:validation", "no-such/corpus:config:train"):
        with pytest.raises(DLRError, match=f"{name} is neither a file nor a dataset") as caught:
            load_text(name, tokenizer, tokens=640, sequence_length=64)
        assert "\n" not in str(caught.value)
    with pytest.raises(DLRError, match="name:config:split"):
        load_text("a:b:c:d", tokenizer, tokens=640, sequence_length=64)


def test_self_is_repeatable_and_leaves_random_numbers_alone(tokenizer, model):
    def sample(seed, temperature=1.0):
        return load_text(
            "self",
            tokenizer,
            tokens=2880,
            heldout_tokens=320,
            sequence_length=32,
            model=model,
            seed=seed,
            temperature=temperature,
        )

    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = sample(1)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(8)
    again, other = sample(1), sample(2)
    assert torch.equal(first.train, again.train) and torch.equal(first.heldout, again.heldout)
    assert not torch.equal(first.train, other.train)
    assert first.train.shape == (90, 32) and first.heldout.shape == (10, 32)
    assert (first.train[:, 0] == tokenizer.bos_token_id).all()
    assert len({tuple(row.tolist()) for row in first.train}) == 90
    assert "self" in first.source and "seed 1" in first.source


def test_self_samples_from_the_models_own_distribution(tokenizer, model):
    """Near temperature zero: the greedy continuation, worked out here without a cache or a stop at EOS."""
    text = load_text(
        "self",
        tokenizer,
        tokens=48,
        heldout_tokens=24,
        sequence_length=24,
        model=model,
        temperature=1e-4,
    )
    ids = torch.tensor([[tokenizer.bos_token_id]])
    with torch.no_grad():
        for _ in range(23):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(text.train, ids.expand(2, -1)) and torch.equal(text.heldout, ids)
    warm = load_text(
        "self", tokenizer, tokens=32 * 250, heldout_tokens=32, sequence_length=32, model=model, seed=3
    )
    with torch.no_grad():
        chances = model(input_ids=ids[:, :1]).logits[0, -1].softmax(-1)
    drawn = torch.bincount(warm.train[:, 1], minlength=VOCABULARY) / len(warm.train)
    assert (drawn - chances).abs().sum() < 0.45 < (drawn - 1 / VOCABULARY).abs().sum()


def test_self_without_bos_starts_at_random_ordinary_tokens(model):
    tokenizer = make_tokenizer(bos=False)
    text = load_text("self", tokenizer, tokens=6000, heldout_tokens=2, sequence_length=2, model=model)
    starts = set(text.train[:, 0].tolist())
    assert len(starts) > 250 and tokenizer.eos_token_id not in starts
    text = load_text("self", None, tokens=800, heldout_tokens=8, sequence_length=8, model=model)
    assert len(set(text.train[:, 0].tolist())) > 40


def test_self_leaves_the_models_mode_alone(tokenizer, model):
    model.train()
    try:
        load_text("self", tokenizer, tokens=16, heldout_tokens=8, sequence_length=8, model=model)
        assert all(module.training for module in model.modules())
    finally:
        model.eval()


def test_self_with_a_broken_model(tokenizer, model):
    with pytest.raises(DLRError, match="give one with 'self'"):
        load_text("self", tokenizer, tokens=640, sequence_length=64)
    with pytest.raises(DLRError, match="temperature"):
        load_text("self", tokenizer, tokens=640, sequence_length=64, model=model, temperature=0)
    with pytest.raises(DLRError, match="no language-model head"):
        load_text("self", tokenizer, tokens=64, sequence_length=64, model=model.model)
    weight = model.lm_head.weight.detach().clone()
    try:
        with torch.no_grad():
            model.lm_head.weight[5] = float("nan")
        with pytest.raises(DLRError, match="NaN"):
            load_text("self", tokenizer, tokens=64, sequence_length=64, model=model)
    finally:
        model.lm_head.weight.data.copy_(weight)


def test_impossible_wishes(prose, tokenizer):
    with pytest.raises(DLRError, match="sequence length 1"):
        load_text(prose, tokenizer, tokens=640, sequence_length=1)
    with pytest.raises(DLRError, match="less than one sequence"):
        load_text(prose, tokenizer, tokens=500)
    with pytest.raises(DLRError, match="without a tokenizer"):
        load_text(prose, None, tokens=640, sequence_length=64)


def test_english_topics_is_english():
    text = english_topics()
    assert len(text) > 300_000 and " the " in text and text == english_topics()
