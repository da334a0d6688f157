"""A whole model trained by every strategy has the gradients of plain autograd, and is left as it was."""

import pytest
import torch
from attacked import MLPS, locked_llama
from tiny import tiny_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from dlr_lock.audit.strategies.model import attention_linears, layer_of, model_cost, prepared
from dlr_lock.audit.strategies.table import Strategy, model_strategies
from dlr_lock.common.errors import DLRError
from dlr_lock.convert.mlp_matching import is_linear
from dlr_lock.triton_kernels import backend


def model_of(*, locked: bool) -> PreTrainedModel:
    return locked_llama(lanes=3) if locked else tiny_model("llama")


def gradients(model: PreTrainedModel, strategy: Strategy, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)  # adapters start at random
    with prepared(model, MLPS, strategy) as trained:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss, list(torch.autograd.grad(loss, trained))


@pytest.mark.parametrize("locked", [True, False])
def test_gradients(locked: bool) -> None:
    model, ids = model_of(locked=locked).double(), torch.randint(320, (2, 9))
    before = {name: p.clone() for name, p in model.named_parameters()}
    strategies = model_strategies(locked=locked)
    plain = {}
    for strategy in strategies:
        loss, got = gradients(model, strategy, ids)
        wanted = plain.setdefault(strategy.trainable, got)  # plain comes first
        assert len(got) == len(wanted) and torch.cat([g.flatten() for g in wanted]).norm() > 1e-4
        for a, b in zip(got, wanted, strict=True):
            assert (a - b).norm() <= 1e-10 * (1e-6 + b.norm()), strategy.name
        assert loss.isfinite()
    assert len(plain["adapters"]) == 2 * 4 * 2 + (2 * 2 * 2 if locked else 2 * 3 * 2)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad == (
            not name.rpartition(".")[2].startswith("dlr_")
        )
    assert all("forward" not in vars(m) and not m._forward_hooks for m in model.modules())


def test_costs_of_a_whole_model() -> None:
    """Each layer keeps its chain's states, a checkpoint its input, in a model that is never given memory."""
    held = {}
    with FakeTensorMode():
        for locked in (True, False):
            model, ids = model_of(locked=locked), torch.zeros(4, 64, dtype=torch.int64)
            for strategy in model_strategies(locked=locked):
                if strategy.trainable == "weights" and strategy.name.endswith(("plain", "inversion")):
                    row = model_cost(model, MLPS, strategy, ids)
                    assert row.counts is not None and row.seconds is None
                    held[locked, strategy.name] = row.counts
    # A token's numbers in a layer: three lanes of five states, which share the first, what the steps read and give, and
    # the sum of updates; against three last states and what the steps read.
    less = (15 * 64 - 2 * 64 + 2 * 240 + 64) - (3 * 64 + 240)
    assert held[True, "plain"].held - held[True, "inversion"].held == 2 * 4 * 256 * less
    assert held[True, "layer checkpoint, plain"].held == held[False, "layer checkpoint, plain"].held
    assert held[True, "layer checkpoint, inversion"].peak < held[True, "layer checkpoint, plain"].peak
    assert held[True, "inversion"].held < held[False, "plain"].held
    assert held[True, "plain"].flops == held[False, "plain"].flops


def test_layers_are_numbered_and_adapters_find_their_linear_layers() -> None:
    assert layer_of("model.layers.11.mlp") == "model.layers.11" and layer_of("h.3.mlp.c") == "h.3"
    with pytest.raises(DLRError, match="no numbered layer"):
        layer_of("model.mlp")
    model = model_of(locked=False)
    names = {m: name for name, m in model.named_modules()}
    found = [names[m].rpartition(".")[2] for m in attention_linears(model, MLPS[:1])]
    assert found == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_adapters_of_conv1d_layers_change_what_they_give() -> None:
    """GPT-2's linear layers keep their weights [in, out]: W + V U there is its transpose."""
    model, ids = tiny_model("gpt2").double(), torch.randint(320, (2, 9))
    names = ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    strategy = next(p for p in model_strategies(locked=False) if p.trainable == "adapters")
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    with prepared(model, names, strategy) as trained:
        assert len(trained) == 2 * 2 * 4  # c_attn and both c_proj and c_fc of two layers
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, plain)
            for V in trained[::2]:
                V.normal_(std=0.1)
            adapted = model(input_ids=ids).logits
            linears = [
                *attention_linears(model, names),
                *(m for n in names for m in _linears(model.get_submodule(n))),
            ]
            for linear, V, U in zip(linears, trained[::2], trained[1::2], strict=True):
                linear.weight += (V @ U).mT
    with torch.no_grad():
        assert (model(input_ids=ids).logits - adapted).abs().max() < 1e-9 < (plain - adapted).abs().max()


def _linears(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if is_linear(m)]


def test_a_model_without_linear_layers_has_no_adapters() -> None:
    strategy = next(p for p in model_strategies(locked=False) if p.trainable == "adapters")
    with pytest.raises(DLRError, match="nothing to train"), prepared(tiny_model("llama"), [], strategy):
        pass


@pytest.mark.parametrize("locked", [True, False])
def test_adapters_of_all_but_the_mlps_are_those_of_peft(locked: bool) -> None:
    """The same weights in PEFT's adapters give the same loss and gradients."""
    peft = pytest.importorskip("peft")
    model, ids = model_of(locked=locked).double(), torch.randint(320, (2, 9))
    strategy = next(s for s in model_strategies(locked=locked) if s.trainable == "adapters")
    with prepared(model, MLPS, strategy, MLPS) as trained:
        assert len(trained) == 2 * 4 * 2  # q, k, v and o of both layers
        with torch.no_grad():
            for adapter in trained:
                adapter.normal_(std=0.1)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        wanted = torch.autograd.grad(loss, trained)
    rank = trained[0].shape[1]
    plan = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=r".*self_attn\.[qkvo]_proj", task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, plan).double()
    theirs = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    # ours are V, U of each layer in the model's order; theirs lora_A, which is U, and lora_B
    pairs = [part for name in theirs if "lora_A" in name for part in (name.replace("lora_A", "lora_B"), name)]
    with torch.no_grad():
        for name, ours in zip(pairs, trained, strict=True):
            theirs[name].copy_(ours)
    with backend("naive"):
        their_loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
    assert their_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    got = torch.autograd.grad(their_loss, [theirs[name] for name in pairs])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
