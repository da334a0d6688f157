"""What a layer costs, against what it does cost: noise in its MLP's output, and the KL that follows."""

import json
from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, tiny_model
from typer.testing import CliRunner

from dlr_lock.cli import app
from dlr_lock.common.errors import DLRError
from dlr_lock.convert.mlp_discovery import find_mlps
from dlr_lock.convert.outlook import sensitivity
from dlr_lock.convert.outlook.sensitivity import Foretold, LayerCost, cheapest, layer_costs


@pytest.mark.parametrize(
    ("kind", "sure"), [("llama", 20), ("opt", 4)]
)  # MLPs with a module of their own, and without
def test_a_layers_cost_is_the_kl_that_noise_of_that_size_makes(kind: str, sure: float) -> None:
    torch.manual_seed(0)
    model = tiny_model(kind, layers=3)
    mlps = find_mlps(model)
    with torch.no_grad():  # layers that matter differently, in a model that is sure of something
        for factor, mlp in zip((1.0, 3.0, 0.3), mlps, strict=True):
            assert mlp.down is not None
            mlp.down.weight(model).mul_(factor)
        model.lm_head.weight.mul_(sure)
    ids = torch.randint(0, VOCABULARY, (64, 32))
    costs = layer_costs(model, mlps, ids, 51_200)
    error = 0.001  # small, as the formula wants it

    def kl(name: str) -> float:
        def noisy(module: torch.nn.Module, args: object, y: torch.Tensor) -> torch.Tensor:
            noise = torch.randn_like(y)
            return y + noise * (error / y.shape[-1]) ** 0.5 * y.flatten(0, -2).square().mean(0).sum().sqrt()

        with torch.no_grad():
            p = model(ids).logits.double().log_softmax(-1)
            handle = model.get_submodule(name).register_forward_hook(noisy)
            q = model(ids).logits.double().log_softmax(-1)
            handle.remove()
        return (p.exp() * (p - q)).sum(-1).mean().item()

    for cost, mlp in zip(costs, mlps, strict=True):
        formula = cost.kl / sensitivity._MEASURED / cost.error
        assert formula == pytest.approx(kl(mlp.output) / error, rel=0.15)


@pytest.mark.parametrize("noise", [0.2, 0.005])
@pytest.mark.parametrize("fast", [False, True], ids=["float32", "bfloat16"])
def test_what_a_linear_map_leaves_is_what_noise_there_is(noise: float, fast: bool) -> None:
    d, tokens = 16, 512
    mlp = find_mlps(tiny_model("llama", layers=1))[0]
    watched = sensitivity._Watched(mlp)
    x = torch.randn(tokens, d) * 100
    y = x @ torch.randn(d, d) + 300
    y += torch.randn_like(y) * y.square().sum(1, keepdim=True).div(d).sqrt() * noise**0.5
    y[:3] *= 1000  # massive tokens count for one each
    with torch.autocast("cpu", torch.bfloat16, enabled=fast):  # as in a model's pass
        for part in torch.arange(tokens).split(100):
            watched.enter(None, (x[part],), {})
            watched.leave(None, None, y[part].clone())
    read, wanted = torch.cat([x, torch.ones(tokens, 1)], 1).double(), y.double()
    size = wanted.norm(dim=1, keepdim=True)
    best = torch.linalg.lstsq(read / size, wanted / size).solution
    left = (read @ best / size - wanted / size).square().sum() / (tokens - d - 1)
    assert watched.linear() == pytest.approx(left.item(), rel=0.01)
    assert watched.linear() == pytest.approx(noise / (1 + noise), rel=0.15, abs=0.015)
    errors = [sensitivity.expected_error(watched.linear(), n) for n in (1, 51_200, 102_400, 10**9)]
    assert errors[0] == errors[1] > errors[2] >= errors[3] > 0


def test_the_cheapest_are_named_in_their_order() -> None:
    costs = [LayerCost(n, (f"mlp.{n}",), 0.1, kl) for n, kl in enumerate((0.4, 0.1, 0.3, 0.2))]
    assert cheapest(costs, 2) == [1, 3]
    assert cheapest(costs, 4) == [0, 1, 2, 3]


def test_one_layer_costs_what_it_costs_alone_and_many_less_than_their_sum() -> None:
    costs = [LayerCost(n, (f"mlp.{n}",), 0.1, 0.1) for n in range(30)]
    one, all = Foretold.of(costs[:1]), Foretold.of(costs)
    assert one.kl == pytest.approx(0.1) and all.kl == pytest.approx(3.0 * 0.57, rel=0.03)
    assert all.kl_between[0] < all.kl < all.kl_between[1]
    assert 0 < all.loss_gap_between[0] < all.kl < all.loss_gap_between[1]


@pytest.mark.parametrize(
    ("kind", "words"), [("bert", "predict the next token"), ("mixtral", "not known of mixtures of experts")]
)
def test_a_model_of_which_nothing_is_known_is_refused(kind: str, words: str) -> None:
    model = tiny_model(kind, layers=2)
    with pytest.raises(DLRError, match=words):
        layer_costs(model, find_mlps(model), torch.zeros(2, 8, dtype=torch.int64), 51_200)


@pytest.mark.parametrize(
    ("value", "words"), [(float("inf"), "a backward pass failed: "), (1e25, r"layers\.1\.mlp writes")]
)
def test_what_is_no_number_is_no_cost(value: float, words: str) -> None:
    model = tiny_model("llama", layers=2)
    mlps = find_mlps(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(value)
    with pytest.raises(DLRError, match=words):
        layer_costs(model, mlps, torch.randint(0, VOCABULARY, (8, 32)), 51_200)


def test_the_command_names_layers_that_a_conversion_takes(tmp_path: Path) -> None:
    tiny_model("llama", layers=3).save_pretrained(tmp_path / "source")
    command = ["layers", str(tmp_path / "source"), "--tokens", "256", "--effort", "quick"]
    done = CliRunner().invoke(app, [*command, "--layers", "AUTO:2"])
    assert done.exit_code == 0 and "the cheapest 2: --layers " in done.stdout
    done = CliRunner().invoke(app, [*command, "--layers", "1-2"])
    assert done.exit_code == 0 and "--layers 1-2, together a KL of about " in done.stdout
    done = CliRunner().invoke(app, [*command, "--json", "--layers", "0,2"])
    found = json.loads(done.stdout)
    assert [cost["layer"] for cost in found["layers"]] == [0, 1, 2]
    assert found["together"]["layers"] == [found["layers"][0], found["layers"][2]]
    for layers, words in (("auto:4", "the model has MLPs in 3 layers"), ("2-3", "layer 3 is out of range")):
        done = CliRunner().invoke(app, [*command, "--layers", layers], standalone_mode=False)
        assert isinstance(done.exception, DLRError) and words in str(done.exception)
    done = CliRunner().invoke(app, [*command[:2], "--tokens", "32"], standalone_mode=False)
    assert isinstance(done.exception, DLRError) and "--tokens must be at least" in str(done.exception)
