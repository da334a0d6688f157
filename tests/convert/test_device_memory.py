"""Where a device's memory runs out: the same conversion in smaller micro-batches, or one line.

There is no GPU here. What plays one refuses, with the error of torch's own allocators, every matrix product whose
result has more than so many numbers, forward and backward alike; all else is the real work.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import VOCABULARY, save_tiny, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from dlr_lock import DLRError, convert_model
from dlr_lock.common.micro_batch import MicroBatch
from dlr_lock.convert.activations.calibrator import SequentialCalibrator
from dlr_lock.convert.activations.capture import capture
from dlr_lock.convert.activations.pairs import Activations
from dlr_lock.convert.config import Recipe
from dlr_lock.convert.data import english_topics
from dlr_lock.convert.distill import Gradients, distill, random_init
from dlr_lock.convert.end_to_end import EndToEndPlan, TrainableChain, distance, train_end_to_end, with_chains
from dlr_lock.convert.mlp_discovery import find_mlps
from dlr_lock.convert.redistill import redistill
from dlr_lock.runtime import DLRNet, DLRSpec

CPU = torch.device("cpu")
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
ROOM = 1 << 30


class SmallDevice(TorchDispatchMode):
    """Refuses products of more than `numbers` numbers, at most so many times, and those whose turns are in `turns`."""

    def __init__(self, numbers: int, times: float = math.inf, turns: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.numbers, self.times, self.turns = numbers, times, turns
        self.products = self.largest = self.refused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in PRODUCTS:
            self.products += 1
            large = result.numel() > self.numbers and self.refused < self.times
            if large or self.products in self.turns:
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            self.largest = max(self.largest, result.numel())
        return result


def chain(d: int, depth: int = 3, gated: bool = False) -> DLRNet:
    net = DLRNet(DLRSpec(d, 1, depth, 16, gated=gated))
    net.assign({name: 0.2 * torch.randn_like(p) for name, p in net.named_parameters()})
    return net


@pytest.mark.parametrize("arch", ["llama", "bert", "mixtral"])
def test_a_conversion_comes_to_the_same_in_smaller_micro_batches(arch: str, tmp_path: Path) -> None:
    text = tmp_path / "topics.txt"
    text.write_text(english_topics()[:40_000], encoding="utf-8")
    save_tiny(arch, tmp_path / "source", layers=2)
    options: dict[str, Any] = {
        "data": str(text), "tokens": 2048, "heldout": 1024, "train_tokens": 8192, "batch": 2048, "depth": 3, "rank": 16,
        "end_to_end": 4096, "redistill": 0.0, "expert_tokens": 1024, "dtype": "float32", "sequence": 128,
    }  # fmt: skip
    whole = convert_model(tmp_path / "source", tmp_path / "whole", **options)
    # One sequence of logits, half a batch of a chain's states.
    device = SmallDevice(1024 * 64)
    with device:
        parts = convert_model(tmp_path / "source", tmp_path / "parts", **options)
    assert device.refused
    said = [note for note in parts.warnings if "memory did not hold" in note]
    assert [note for note in parts.warnings if note not in said] == whole.warnings
    works = [
        "the reading of activations",
        "the distillation of modules",
        "the end-to-end phase",
        "the measuring of the model",
    ]
    if arch == "mixtral":
        works[1:3] = ["the distillation of experts"]
    assert len(said) == len(works) and all(any(work in note for note in said) for work in works)
    for one, two in zip(whole.modules, parts.modules, strict=True):
        assert two.fidelity.rel_error == pytest.approx(one.fidelity.rel_error, rel=1e-3)
        assert two.fidelity.flatten_gap == pytest.approx(one.fidelity.flatten_gap, rel=1e-2)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-3 * one[name].norm(), name


def test_a_steps_gradients_are_the_same_and_silent_tokens_count_as_little() -> None:
    spec = DLRSpec(32, 1, 3, 16)
    weights = random_init(spec, torch.Generator().manual_seed(0))
    x, y = torch.randn(64, 32), torch.randn(64, 32)
    y[:16] = 0  # a whole part: by itself its size would be that of nothing, not a millionth of the batch's
    found = []
    for device in (SmallDevice(ROOM), SmallDevice(32 * 16)):
        micro = MicroBatch("the fit", "token")
        with device, Gradients(spec, torch.ones(32), torch.zeros(32), micro) as gradients:
            loss = gradients.fill(weights, x, y, len(x))
        found.append([loss, *(w.grad.clone() for w in weights.values())])
        assert (micro.note is None) == (device.refused == 0)
    assert micro.note is not None and "64 tokens at once" in micro.note and "16 tokens" in micro.note
    for one, two in zip(*found, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("when", [0.2, 0.5, 0.9])
def test_whenever_it_happens_a_step_is_begun_anew(when: float) -> None:
    """Also behind a part that is done, and in the middle of a backward pass."""
    model, ids = tiny_model("llama", layers=2), torch.randint(0, VOCABULARY, (8, 32))
    chains = {mlp.module: chain(64) for mlp in find_mlps(model)}
    plan = EndToEndPlan(256, batch=256, rate=0.01)

    def train(*turns: int) -> tuple[SmallDevice, dict[str, Any]]:
        device, micro = SmallDevice(ROOM, turns=turns), MicroBatch("the phase", "sequence")
        with device:
            return device, train_end_to_end(model, chains, [], ids, plan, micro=micro)

    whole = train()[1]
    with SmallDevice(ROOM) as device:
        places = {name: TrainableChain(net, CPU) for name, net in chains.items()}
        distance(with_chains(model, places, []), model, ids).backward()
    first = round(when * device.products)
    device, parts = train(first, 2 * first + device.products)  # the second in the last of two parts
    assert device.refused == 2
    for name, net in whole.items():
        for (_, one), (_, two) in zip(net.named_parameters(), parts[name].named_parameters(), strict=True):
            assert (one - two).norm() <= 1e-4 * (one.norm() + 1)
    spec, x, y = DLRSpec(32, 1, 3, 16), torch.randn(64, 32), torch.randn(64, 32)
    weights = random_init(spec, torch.Generator().manual_seed(0))

    def fill(*turns: int) -> tuple[SmallDevice, list[torch.Tensor]]:
        device, micro = SmallDevice(ROOM, turns=turns), MicroBatch("the fit", "token")
        with device, Gradients(spec, torch.ones(32), torch.zeros(32), micro) as gradients:
            return device, [
                gradients.fill(weights, x, y, len(x)),
                *(w.grad.clone() for w in weights.values()),
            ]

    device, wanted = fill()
    first = round(when * device.products)
    again, got = fill(first, 2 * first + device.products)
    assert again.refused == 2
    for one, two in zip(wanted, got, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_activations_are_read_in_parts_and_streams_move_once(tmp_path: Path) -> None:
    model, ids = tiny_model("llama", layers=3), torch.randint(0, VOCABULARY, (6, 32))
    mlps = find_mlps(model)
    net = chain(64)
    found = []
    for device in (SmallDevice(ROOM), SmallDevice(2 * 32 * 160)):
        with device:
            own = [
                (p.x.clone(), p.y.clone())
                for _, p in capture(model, mlps, ids, max_memory=ROOM, scratch=tmp_path)
            ]
            streams = SequentialCalibrator(model, mlps, ids, max_memory=ROOM, scratch=tmp_path)
            drift = [streams.put(mlps[0], net), streams.put(mlps[1], net)]
            last = streams.pairs(mlps[2])
        found.append([*(t for pair in own for t in pair), last.x, last.y, torch.tensor(drift)])
        assert device.largest <= device.numbers
    assert device.refused
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one.float(), two.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("init", "times"), [("flat", math.inf), ("random", math.inf), ("linear", 2)])
def test_the_attack_finds_the_same_student(init: str, times: float) -> None:
    net, n, d = chain(32), 2048, 32
    x = torch.randn(n + 512, d)
    with torch.no_grad():
        y = net(x)
    found = []
    for device in (SmallDevice(ROOM), SmallDevice(48 * 100, times)):
        pairs = Activations(x, y, torch.arange(len(x)) % 64 == 0, mapped=False)
        with device:
            found.append(
                redistill(
                    net,
                    pairs,
                    n,
                    train_tokens=2048,
                    conversion=4096,
                    name="mlp",
                    device=CPU,
                    inits=[init],
                    seed=0,
                )
            )
    assert device.refused
    assert found[1].error == pytest.approx(found[0].error, rel=1e-2)
    assert found[1].student_error == pytest.approx(found[0].student_error, rel=1e-2)


def test_what_does_not_fit_one_at_a_time_ends_in_a_line_that_says_what_to_do(tmp_path: Path) -> None:
    x, y = torch.randn(1024, 32), torch.randn(1024, 32)
    pairs = Activations(x, y, torch.zeros(1024, dtype=torch.bool), mapped=False)
    whole = 32 * 32  # the covariance of x
    with (
        SmallDevice(whole),
        pytest.raises(DLRError, match=r"does not hold .* of layer 3, even one token .*--device cpu"),
    ):
        distill(pairs, 1024, DLRSpec(32, 1, 2, 1040), Recipe(2048, 512), name="layer 3", device=CPU)
    model, ids = tiny_model("llama", layers=2), torch.randint(0, VOCABULARY, (6, 32))
    with SmallDevice(16 * 160), pytest.raises(DLRError, match="activations, even one sequence"):
        list(capture(model, find_mlps(model), ids, max_memory=ROOM, scratch=tmp_path))
