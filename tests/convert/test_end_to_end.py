"""The end-to-end phase on tiny models: nearer to the original, and nothing else touched."""

import copy
import math

import pytest
import torch
from tiny import VOCABULARY, tiny_model

from dlr_lock.common.errors import DLRError
from dlr_lock.convert.end_to_end import EndToEndPlan, distance, flatten_gaps, train_end_to_end, with_chains
from dlr_lock.convert.evaluate import Evaluation, compare
from dlr_lock.convert.mlp_discovery import find_mlps
from dlr_lock.runtime import DLRNet, DLRSpec
from dlr_lock.triton_kernels import flattened_reference


def locked(arch: str, dtype: torch.dtype = torch.float32):
    model = tiny_model(arch, layers=2)
    mlps = find_mlps(model)
    chains = {}
    for mlp in mlps:
        net = DLRNet(DLRSpec(mlp.hidden_size, 1, 3, 16), dtype=dtype)
        net.assign(
            {name: 0.1 * torch.randn_like(p, dtype=torch.float32) for name, p in net.named_parameters()}
        )
        chains[mlp.module] = net
    return model, chains, [name for mlp in mlps for name in mlp.identity]


@pytest.mark.parametrize(
    ("arch", "dtype"), [("llama", torch.bfloat16), ("opt", torch.float32), ("bert", torch.float32)]
)
def test_it_comes_nearer_to_the_original_and_leaves_it_alone(arch: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, chains, identity = locked(arch, dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(0, VOCABULARY, (16, 32))
    trained = train_end_to_end(model, chains, identity, ids, EndToEndPlan(16 * 32 * 12, batch=128, rate=0.01))
    figures = [compare(with_chains(model, c, identity), model, ids) for c in (chains, trained)]
    first, second = ((e.kl if isinstance(e, Evaluation) else e.state_error) for e in figures)
    assert second < 0.9 * first
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {net.dlr_A.dtype for net in trained.values()} == {dtype}


def test_the_distance_is_the_mean_kl_over_every_position() -> None:
    model, chains, identity = locked("llama")
    student = with_chains(model, chains, identity)
    ids = torch.randint(0, VOCABULARY, (3, 20))
    with torch.no_grad():
        p, q = (m(ids).logits.double().log_softmax(-1) for m in (model, student))
        got = distance(student, model, ids).item()
    assert got == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


def test_the_flatten_gap_in_the_model_is_its_definition() -> None:
    model, chains, identity = locked("llama")
    student = with_chains(model, chains, identity)
    seen: list[torch.Tensor] = []
    name, net = next(iter(chains.items()))
    handle = student.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    ids = torch.randint(0, VOCABULARY, (3, 20))
    gap = flatten_gaps(student, chains, ids)[name]
    handle.remove()
    x = seen[0].flatten(0, 1)
    with torch.no_grad():
        y, flat = net(x), flattened_reference(x, net.chain)
    assert gap == pytest.approx(((flat - y).square().sum(1) / y.square().sum(1)).mean().item(), rel=1e-3)


def test_a_phase_that_diverges_is_said() -> None:
    model, chains, identity = locked("llama")
    broken = copy.deepcopy(chains)
    next(iter(broken.values())).dlr_B.data.fill_(math.nan)
    with pytest.raises(DLRError, match="diverged"):
        train_end_to_end(model, broken, identity, torch.randint(0, VOCABULARY, (4, 16)), EndToEndPlan(64))
