"""Sequential distillation: what a module is asked for, and that errors are corrected, not carried on."""

from pathlib import Path

import pytest
import torch
from locked import Given
from tiny import VOCABULARY, tiny_model

from dlr_lock.convert.activations.calibrator import SequentialCalibrator
from dlr_lock.convert.activations.capture import capture
from dlr_lock.convert.config import Recipe
from dlr_lock.convert.distill import distill
from dlr_lock.convert.layer_runner import LayerRunner
from dlr_lock.convert.mlp_discovery import find_mlps
from dlr_lock.convert.mlp_matching import MLP
from dlr_lock.runtime import DLRNet, DLRSpec

CPU = torch.device("cpu")
ROOM = 1 << 30


def tokens(sequences: int = 6, n: int = 32) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (sequences, n))


def wrong_chain(mlp: MLP) -> DLRNet:
    net = DLRNet(DLRSpec(mlp.hidden_size, 1, 2, 16))
    net.assign({name: 0.3 * torch.randn_like(p) for name, p in net.named_parameters()})
    return net


@pytest.mark.parametrize("arch", ["llama", "bert", "gemma2", "opt"])
def test_before_anything_is_locked_the_pairs_are_the_originals(arch: str, tmp_path: Path) -> None:
    model = tiny_model(arch, layers=3)
    mlps, ids = find_mlps(model)[1:], tokens()
    pairs = SequentialCalibrator(model, mlps, ids, max_memory=ROOM, scratch=tmp_path).pairs(mlps[0])
    captured = capture(model, mlps, ids, max_memory=ROOM, scratch=tmp_path)
    _, wanted = next(captured)
    for got, want in ((pairs.x, wanted.x), (pairs.y, wanted.y)):
        assert torch.allclose(got.float(), want.float(), rtol=1e-2, atol=1e-4)
    assert torch.equal(pairs.first, wanted.first)


@pytest.mark.parametrize("memory", [ROOM, 1])
@pytest.mark.parametrize("arch", ["llama", "bert", "gpt_neox", "opt"])
def test_a_module_that_does_as_asked_repairs_the_hidden_states(
    arch: str, memory: int, tmp_path: Path
) -> None:
    """After a chain that is quite wrong, y* in the next layer's place must bring back the original's states."""
    model = tiny_model(arch, layers=3)
    mlps, ids = find_mlps(model), tokens()
    streams = SequentialCalibrator(model, mlps, ids, max_memory=memory, scratch=tmp_path)
    chain = wrong_chain(mlps[0])
    drift = streams.put(mlps[0], chain)
    assert drift > 1e-3
    pairs = streams.pairs(mlps[1])

    stack = LayerRunner(model, mlps, ids)
    true = stack.run(1, stack.run(0, stack.embed(ids)))
    bent = stack.look(mlps[0], stack.embed(ids), instead={mlps[0].module: chain}).out
    assert torch.allclose(
        pairs.x.float().flatten(), stack.look(mlps[1], bent).x.flatten(), rtol=2e-2, atol=1e-2
    )
    repaired = stack.look(mlps[1], bent, instead={mlps[1].module: Given(pairs.y.float())}).out
    spoilt = stack.look(mlps[1], bent).out
    assert (repaired - true).norm() < 0.02 * (spoilt - true).norm()


def test_the_drift_is_that_of_the_locked_model(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=3)
    mlps, ids = find_mlps(model), tokens()
    chain = wrong_chain(mlps[1])
    drift = SequentialCalibrator(model, mlps, ids, max_memory=ROOM, scratch=tmp_path).put(mlps[1], chain)
    states = []
    for replaced in (False, True):
        if replaced:
            model.model.layers[1].mlp = chain
        with torch.no_grad():
            states.append(model.model(ids, output_hidden_states=True).hidden_states[2])
    error = (states[1] - states[0]).square().sum(-1) / states[0].square().sum(-1)
    assert drift == pytest.approx(error.mean().item(), rel=1e-3)


def test_errors_are_corrected_along_the_way(tmp_path: Path) -> None:
    """The same effort a module: sequential ends nearer to the original than independent."""
    torch.manual_seed(0)
    model = tiny_model("llama", layers=4)
    mlps, ids = find_mlps(model), tokens(64)
    spec = DLRSpec(mlps[0].hidden_size, 1, 6, 32)

    def fit(pairs, mlp: MLP) -> DLRNet:
        net = DLRNet(spec)
        recipe = Recipe(train_tokens=20_480, batch=256, seed=mlp.layer)
        net.assign(distill(pairs, ids.numel(), spec, recipe, name=mlp.module, device=CPU))
        return net

    streams = SequentialCalibrator(model, mlps, ids, max_memory=ROOM, scratch=tmp_path)
    sequential = [streams.put(mlp, fit(streams.pairs(mlp), mlp)) for mlp in mlps]
    captured = capture(model, mlps, ids, max_memory=ROOM, scratch=tmp_path)
    chains = [fit(pairs, mlp) for mlp, pairs in captured]
    streams = SequentialCalibrator(model, mlps, ids, max_memory=ROOM, scratch=tmp_path)
    independent = [streams.put(mlp, chain) for mlp, chain in zip(mlps, chains, strict=True)]
    assert sequential[0] == pytest.approx(independent[0], rel=0.02)  # nothing to correct yet
    assert sequential[-1] < independent[-1]


def test_pairs_beyond_the_memory_lie_in_files_and_so_does_what_is_made_of_them(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=2)
    mlps = find_mlps(model)
    pairs = SequentialCalibrator(model, mlps, tokens(), max_memory=1000, scratch=tmp_path).pairs(mlps[0])
    assert pairs.mapped and pairs.scratch == tmp_path
