"""Loss, divergence and flips, against plain float64 arithmetic on real tiny models."""

import copy
import json
import math
import sys

import pytest
import torch
from tiny import VOCABULARY, tiny_config, tiny_model
from torch.nn import functional as F
from transformers import BertForSequenceClassification

from dlr_lock.common.errors import DLRError
from dlr_lock.convert.evaluate import Evaluation, MeanDivergence, evaluate, measure
from dlr_lock.runtime import DLRNet, DLRSpec


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", initializer_range=0.3)


@pytest.fixture(scope="module")
def other():
    return tiny_model("llama", seed=5, initializer_range=0.3)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(VOCABULARY, (7, 19), generator=torch.Generator().manual_seed(1))


def by_hand(model, tokens):
    """Float64 log probabilities [S * (n - 1), V] of all but the first token."""
    with torch.no_grad():
        return model(input_ids=tokens).logits[:, :-1].flatten(0, 1).double().log_softmax(-1)


def test_loss_is_next_token_cross_entropy(model, tokens):
    result = evaluate(model, tokens)
    expected = F.nll_loss(by_hand(model, tokens), tokens[:, 1:].flatten()).item()
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert result.tokens == 7 * 18
    assert result.original_loss is result.loss_gap is result.kl is result.flips is None
    with torch.no_grad():  # transformers' own idea of it
        assert result.loss == pytest.approx(model(input_ids=tokens, labels=tokens).loss.item(), rel=1e-5)


def test_distance_to_the_original(model, tokens):
    locked = copy.deepcopy(model)
    with torch.no_grad():
        locked.model.layers[1].mlp.down_proj.weight.mul_(0.3)
        locked.lm_head.weight.mul_(0.5)  # a flatter distribution: KL differs from KL the other way round
    result = evaluate(locked, tokens, original=model)
    p, q = by_hand(model, tokens), by_hand(locked, tokens)
    assert result.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert 0.05 < result.kl != pytest.approx((q.exp() * (q - p)).sum(-1).mean().item(), rel=1e-2)
    flips = (p.argmax(-1) != q.argmax(-1)).double().mean().item()
    assert 0 < flips < 1 and result.flips == pytest.approx(flips)
    assert result.original_loss == pytest.approx(evaluate(model, tokens).loss, rel=1e-6)
    assert result.original_perplexity == pytest.approx(math.exp(result.original_loss))
    assert result.loss_gap == result.loss - result.original_loss != 0


def test_a_model_is_at_no_distance_from_itself(model, tokens):
    result = evaluate(model, tokens, original=model)
    assert result.kl == pytest.approx(0, abs=1e-9) and result.flips == result.loss_gap == 0


def test_batches_and_chunks_do_not_change_the_figures(model, other, tokens, monkeypatch):
    whole = evaluate(model, tokens, original=other)
    monkeypatch.setattr(sys.modules[evaluate.__module__], "elements_at_once", lambda device: 5 * VOCABULARY)
    done = []
    parts = evaluate(
        model,
        tokens,
        original=other,
        batch=2,
        progress=lambda *state: done.append(state),
    )
    for key, value in whole.to_dict().items():
        assert parts.to_dict()[key] == pytest.approx(value, rel=1e-5), key
    assert done == [(0, 7), (2, 7), (4, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize("at_once", [1, 3 * 50, 2**20])
def test_mean_divergence_and_its_gradient(at_once, monkeypatch):
    """Against autograd in float64; a token that the original rules out, and equal rows, count nothing."""
    wanted, got = torch.randn(2, 7, 50).mul(4).unbind()
    wanted[0, 3] = -torch.inf
    wanted[5] = got[5]
    got.requires_grad_()
    monkeypatch.setattr(sys.modules[evaluate.__module__], "elements_at_once", lambda device: at_once)
    loss = MeanDivergence.apply(wanted, got)
    (loss * 3).backward()
    p, q = wanted.double().softmax(-1), got.detach().double().requires_grad_()
    exact = torch.nn.functional.kl_div(q.log_softmax(-1), p, reduction="batchmean")
    (exact * 3).backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    torch.testing.assert_close(got.grad.double(), q.grad, rtol=1e-4, atol=1e-6)


def test_a_large_vocabulary_goes_through_in_smaller_batches(tokens):
    """8 sequences of 64 tokens over 200,000 words make 410 MB of logits; 256 MiB a pass are allowed."""
    big = tiny_model("llama", vocab_size=200_000)
    largest = 0

    def watch(module, args, output):
        nonlocal largest
        largest = max(largest, output.numel() * 4)

    big.lm_head.register_forward_hook(watch)
    evaluate(big, torch.randint(VOCABULARY, (8, 64)), batch=32)
    assert 100 * 2**20 < largest <= 256 * 2**20


def test_bfloat16_models_are_judged_in_float32(model, tokens):
    half = copy.deepcopy(model).to(torch.bfloat16)
    result = evaluate(half, tokens)
    assert result.loss == pytest.approx(
        F.nll_loss(by_hand(half, tokens), tokens[:, 1:].flatten()).item(), rel=1e-5
    )


def test_dropout_is_off_and_the_mode_comes_back(tokens):
    noisy = tiny_model("llama", attention_dropout=0.5)
    expected = evaluate(noisy, tokens)
    noisy.train()
    noisy.model.layers[0].eval()
    assert evaluate(noisy, tokens) == expected
    assert noisy.training and noisy.lm_head.training and not noisy.model.layers[0].mlp.training
    assert all(parameter.requires_grad for parameter in noisy.parameters())


def test_no_language_model_head(model, tokens):
    for headless in (model.model, BertForSequenceClassification(tiny_config("bert"))):
        with pytest.raises(DLRError, match="no language-model head"):
            evaluate(headless, tokens)


def test_a_loss_that_is_not_finite_names_its_model(model, tokens):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with pytest.raises(DLRError, match="the model's loss is nan"):
        evaluate(broken, tokens)
    with pytest.raises(DLRError, match="the original's loss is nan"):
        evaluate(model, tokens, original=broken)


def test_words_ruled_out_by_both_do_not_count(model, tokens):
    """Some models mask the unused end of their vocabulary with -inf."""
    masked = copy.deepcopy(model)
    masked.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, unused, -math.inf)
    )
    unused = torch.tensor([sorted(set(range(VOCABULARY)) - set(tokens.flatten().tolist()))[0]])
    result = evaluate(masked, tokens, original=masked)
    assert result.kl == pytest.approx(0, abs=1e-9)
    with pytest.raises(DLRError, match="divergence"):
        evaluate(masked, tokens, original=model)


def test_nothing_to_evaluate(model, tokens):
    for empty in (tokens[:0], tokens[:, :1], tokens[0]):
        with pytest.raises(DLRError, match="nothing to evaluate"):
            evaluate(model, empty)


def test_different_vocabularies(model, tokens):
    with pytest.raises(DLRError, match=r"vocabularies \(320 and 321 tokens"):
        evaluate(model, tokens, original=tiny_model("llama", vocab_size=321))


def test_json_holds_every_figure():
    result = Evaluation(loss=900.0, perplexity=math.inf, tokens=5, kl=0.25)
    read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert read["loss"] == 900.0 and read["perplexity"] is None and read["kl"] == 0.25 and read["tokens"] == 5
    assert set(read) >= {"original_loss", "original_perplexity", "loss_gap", "flips"}


def test_one_token_that_is_far_off_is_not_a_chains_whole_error() -> None:
    net = DLRNet(DLRSpec(16, 1, 2, 16), dtype=torch.float32)
    net.assign({name: torch.randn_like(p) / 4 for name, p in net.named_parameters()})
    x = torch.randn(512, 16)
    with torch.no_grad():
        y = net(x) * 1.25  # an error of 1/25 everywhere
        y[7] = net(x[7]) * 1e-2  # and of ten thousand there
    first = torch.zeros(512, dtype=torch.bool)
    first[7] = True
    found = measure(net, x, y, torch.device("cpu"), first)
    assert found.rel_error == pytest.approx((511 / 25 + 1) / 512, rel=1e-3)
    assert found.first_error == pytest.approx(99**2, rel=1e-2)  # where it is looked for, it is seen
