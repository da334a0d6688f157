"""Gradients through locked layers: against float64 Jacobians, none wrong where nothing differs, models as they were."""

import copy
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from attacked import context, locked_llama
from tiny import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlr_lock.audit.context import AuditContext
from dlr_lock.audit.gradients import WHOLE, gradient_section, model_gradients, module_gradients
from dlr_lock.common.hooks import frozen
from dlr_lock.convert.mlp_discovery import find_mlps
from dlr_lock.runtime import DLRNet
from dlr_lock.triton_kernels import chain_reference


def ready(locked: PreTrainedModel, arch: str = "llama", rows: int = 3) -> AuditContext:
    original = tiny_model(arch)
    ids = torch.randint(0, 200, (rows, 24), generator=torch.Generator().manual_seed(5))
    mlps = [mlp for mlp in find_mlps(original) if hasattr(locked.get_submodule(mlp.module), "chain")]
    return context(original, locked, mlps, ids)


class Near(nn.Module):
    """In the MLP's place, a chain whose weights are another's but for a fifth of their size."""

    def __init__(self, net: DLRNet) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)
        self.net.assign({n: w + 0.2 * w.std() * torch.randn_like(w) for n, w in net.named_parameters()})

    def forward(self, x: Tensor) -> Tensor:
        return chain_reference(x, self.net.chain)


def test_a_module_is_compared_by_its_jacobians() -> None:
    """Over cotangents the mean of |J^T v|^2 is the Jacobian's Frobenius norm: of each token in float64."""
    work = ready(locked_llama(), rows=8)
    mlp = work.mlps[1]
    net = work.locked.get_submodule(mlp.module)
    module = Near(net)
    work.original.set_submodule(mlp.module, module)
    seen: list[Tensor] = []
    with frozen(work.original):
        hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        work.original.base_model(input_ids=work.neutral.heldout)
        hook.remove()
    rows = {row.name: row for row in module_gradients(work, {mlp.module: module.net}, "undone")}
    found, student = rows[mlp.module], rows[f"{mlp.module}, undone"]
    chains = [of.chain.to(seen[0].device, torch.float64) for of in (net, module.net)]
    errors, values = [], []
    for x in seen[0].double()[::4]:
        ours, theirs = (
            torch.autograd.functional.jacobian(lambda x, c=c: chain_reference(x[None], c)[0], x)
            for c in chains
        )
        errors.append(((ours - theirs).square().sum() / theirs.square().sum()).clamp(max=1).item())
        out, y = (chain_reference(x[None], c)[0] for c in chains)
        values.append(((out - y).square().sum() / y.square().sum()).clamp(max=1).item())
    # One cotangent a token: the mean of ratios is a tenth above the ratio of means, and varies by as much.
    assert found.error == pytest.approx(fmean(errors), rel=0.3) and 0.01 < fmean(errors) < 0.8
    assert found.value_error == pytest.approx(fmean(values), rel=0.1)
    assert 0.3 < found.cosine < 0.999 and found.tokens == 8 * 24
    # a student that is the MLP itself: the same cotangents, taken back through it
    assert student.error < 1e-6 and student.value_error < 1e-6 and student.cosine == pytest.approx(1)


def test_the_same_model_has_the_same_gradients() -> None:
    work = ready(locked_llama())
    rows = list(model_gradients(replace(work, locked=tiny_model("llama"))))
    assert {row.tokens for row in rows} == {3 * 24}
    assert [row.name for row in rows][:1] == [WHOLE] and len(rows) == 4  # two layers, and what is in none
    assert all(row.error < 1e-10 and row.cosine == pytest.approx(1) for row in rows)
    assert not any(p.requires_grad and p.grad is not None for p in work.original.parameters())


def test_the_loss_s_gradient_is_that_of_autograd() -> None:
    """The whole row, against gradients by backward() on the same tokens, chain weights left out."""
    work = ready(locked_llama())
    whole = next(row for row in model_gradients(work) if row.name == WHOLE)
    flat = []
    for model in (work.locked, work.original):
        for name in ("model.layers.0.mlp", "model.layers.1.mlp") if model is work.locked else ():
            net = model.get_submodule(name)
            net.forward = lambda x, net=net: chain_reference(x, net.chain)
        model.requires_grad_(True)
        ids = work.neutral.heldout
        model(input_ids=ids, labels=ids).loss.backward()
        flat.append(torch.cat([p.grad.double().flatten() for n, p in model.named_parameters()
                               if ".mlp." not in n and p.grad is not None]))  # fmt: skip
    ours, theirs = flat
    assert whole.error == pytest.approx(
        ((ours - theirs).square().sum() / theirs.square().sum()).item(), rel=1e-4
    )
    assert whole.cosine == pytest.approx(torch.cosine_similarity(ours, theirs, dim=0).item(), abs=1e-5)
    assert whole.error > 0.01 and whole.value_error is None


def test_models_are_left_as_they_were() -> None:
    work = ready(locked_llama())
    before = [[(p.clone(), p.requires_grad) for p in m.parameters()] for m in (work.locked, work.original)]
    first = [*module_gradients(work, {}, ""), *model_gradients(work)]
    assert torch.is_grad_enabled()
    for model, old in zip((work.locked, work.original), before, strict=True):
        assert all(
            torch.equal(p, q) and p.requires_grad == wanted
            for p, (q, wanted) in zip(model.parameters(), old, strict=True)
        )
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert first == [*module_gradients(work, {}, ""), *model_gradients(work)]  # drawn from the seed


def test_the_words_say_what_it_means() -> None:
    from test_price import report

    rows = [*module_gradients(ready(locked_llama()), {}, ""), *model_gradients(ready(locked_llama()))]
    section = gradient_section(replace(report(), gradients=rows))
    assert section.table and [row[0] for row in section.table.rows] == [
        WHOLE,
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]
    assert (
        f"{rows[2].error:.0%}" in section.notes[0]
        and "Training through the chains follows" in section.notes[0]
    )
    assert gradient_section(report()).table.rows == []  # type: ignore[union-attr]


def test_long_held_out_sequences_are_taken_in_pieces_of_a_step() -> None:
    work = ready(locked_llama())
    short = replace(work.task, train=work.task.train[:, :8])
    assert {row.tokens for row in model_gradients(replace(work, task=short))} == {3 * 24}
