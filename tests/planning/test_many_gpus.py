"""A plan for several GPUs against the code that divides the work: one process of many does what is counted."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import plans
import pytest
import torch
from tiny import save_tiny, tiny_model
from torch import Tensor
from typer.testing import CliRunner

from dlr_lock import DLRError, DLRNet, DLRSpec
from dlr_lock.cli import app
from dlr_lock.convert.activations.calibrator import SequentialCalibrator
from dlr_lock.convert.activations.capture import batch_of
from dlr_lock.convert.activations.pairs import Activations
from dlr_lock.convert.config import ConversionConfig, Recipe
from dlr_lock.convert.distill import distill
from dlr_lock.convert.outlook.amounts import Amounts
from dlr_lock.convert.outlook.phases import Phase, phases
from dlr_lock.convert.outlook.steps import step_of
from dlr_lock.convert.parallel.ranks import Reckoned
from dlr_lock.convert.parallel.share import Batches, Pair, Share
from dlr_lock.convert.redistill import INITS, half_of, regression_flops
from dlr_lock.planning.plan import Plan, plan_conversion
from dlr_lock.planning.sections import plan_sections
from dlr_lock.planning.subject import open_subject
from dlr_lock.triton_kernels.meter import Meter

CHOICES = plans.CHOICES | {"redistill": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("plan") / "source", layers=5)


def planned(folder: Path, **choices: Any) -> Plan:
    return plans.planned(folder, **(CHOICES | choices))


def of(plan: Plan) -> dict[str, Phase]:
    return {phase.name: phase for phase in plan.phases}


class Own(Share):
    """The others are not there: what is collected of all is this process's."""

    def sample(self, take: Callable[[Tensor], Pair], rows: Tensor) -> Pair:
        return take(self.mine(rows))


@pytest.mark.parametrize("processes", [2, 5])
def test_one_of_many_computes_of_a_step_what_was_counted(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three matrices are two for the first of two processes and one for each of five; rows are dealt out by chance."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    spec, n = DLRSpec(64, 1, 3, 16), 32
    share = Own(Reckoned(processes), torch.zeros(160, n, dtype=torch.int64), torch.zeros(0, n))
    flops = []
    for steps in (1, 41):
        x, y = torch.randn(2, share.tokens.numel(), 64)
        pairs = Activations(x, y, torch.zeros(len(x), dtype=torch.bool), False)
        pairs.share = share
        with Meter() as meter:
            recipe = Recipe(256 * steps, batch=256, init="random")
            distill(pairs, 160 * n, spec, recipe, name="it", device=torch.device("cpu"))
        flops.append(meter.take().flops)
    counted = step_of(spec, Recipe(256, batch=256), 1, processes)
    alone = step_of(spec, Recipe(256, batch=256), 1)
    assert (flops[1] - flops[0]) / 40 == pytest.approx(counted.flops, rel=0.03)
    most = -(-3 // processes) / 3
    assert counted.muon == pytest.approx(alone.muon * most) and counted.reading == alone.reading * most


@pytest.mark.parametrize("processes", [2, 3])
def test_one_of_many_leads_as_much_text_through_the_layers_as_planned(processes: int, folder: Path) -> None:
    config = ConversionConfig.of(CHOICES).resolved(torch.device("cpu"))
    amounts = Amounts.of(open_subject(folder, config), config, processes=processes)
    model, mlps, run = tiny_model("llama", layers=5), amounts.subject.mlps, [0]

    def count(module: Any, args: Any, output: torch.Tensor) -> None:
        run[0] += output.shape[0] * output.shape[1]

    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(count)
    train, held = (torch.randint(320, (sequences, 32)) for sequences in (16, 4))
    share = Share(Reckoned(processes), train, held)
    calibrator = SequentialCalibrator(
        model, mlps, share.tokens, max_memory=10**9, scratch=folder, share=share
    )
    for chains in amounts.chains:
        calibrator.pairs(chains.mlp).close()
        calibrator.put(chains.mlp, DLRNet(chains.spec))
    assert share.tokens.numel() == amounts.own(processes)[0]
    (phase,) = [p for p in phases(amounts) if p.name == "activations"]
    own = sum(2 * chains.spec.params for chains in amounts.chains) * share.tokens.numel()
    assert run[0] == pytest.approx((phase.wide - own) / amounts.layer_flops, rel=0.1)


def test_in_sequence_a_process_has_its_part_of_what_is_divided_and_all_of_the_rest(folder: Path) -> None:
    one, two = (of(planned(folder, gpus=gpus)) for gpus in (1, 2))
    for name in ("distilling", "activations"):
        assert two[name].flops < 0.75 * one[name].flops
    assert two["redistilling"].fit < 0.6 * one["redistilling"].fit
    # The students' wide steps are one block each, but for the linear start's two.
    assert 0.7 < two["redistilling"].muon / one["redistilling"].muon < 1
    for name in ("reading", "calibration text", "writing", "measuring"):
        assert two[name] == one[name]
    # 512 / 32 and 128 / 32 sequences, of which a process of four has 4 and 1; 12 bytes an element.
    four = of(planned(folder, gpus=4))
    assert one["activations"].host - four["activations"].host == (20 - 5) * 32 * 12 * 64
    spilt = [of(planned(folder, gpus=gpus, max_memory=1000))["activations"].disk for gpus in (1, 4)]
    assert spilt[0] == spilt[1]


def test_modules_are_dealt_out_whole(folder: Path) -> None:
    """Five equal modules are two rounds on three GPUs and on four, and one on five and on any more."""
    for gpus, rounds in ((2, 3), (3, 2), (4, 2), (5, 1), (8, 1)):
        one, more = (of(planned(folder, across="independent", gpus=n)) for n in (1, gpus))
        for name in ("distilling", "redistilling"):
            assert more[name].flops == pytest.approx(one[name].flops * rounds / 5)
            assert more[name].device == one[name].device
        assert more["writing"] == one["writing"] and more["measuring"] == one["measuring"]


def test_the_text_up_to_modules_that_are_dealt_out_is_divided(folder: Path) -> None:
    """Of a batch of 128 sequences of 32 tokens one process has all there is; of one of a sequence, each a part."""
    config = ConversionConfig.of(CHOICES | {"across": "independent"}).resolved(torch.device("cpu"))
    for length, own in ((32, 640), (4096, 4096)):
        small = replace(config, sequence=length, tokens=4 * 4096 if length > 32 else 512, heldout=128)
        amounts = Amounts.of(open_subject(folder, small), small, processes=5)
        text = torch.zeros(amounts.tokens // length, length, dtype=torch.int64)
        assert amounts.batch_tokens == Batches(Reckoned(5), text, batch_of(length)).tokens.numel() == own
    # A pass ends in the last of its modules' layers: one for all five, or where there is no room for two, five.
    room = {"across": "independent", "sequence": 32, "tokens": 9 * 4096, "heldout": 4096}
    for memory, passes in ((10**9, 5), (1000, 15)):
        one, five = (of(planned(folder, gpus=n, max_memory=memory, **room))["activations"] for n in (1, 5))
        assert five.flops / one.flops == pytest.approx(2 / 10 * 5 / passes, rel=0.01)
        assert five.sent == pytest.approx(4 / 5 * 2 * 4096 * 5 * 4 * 64) and one.sent == 0
    # What is still to be sent of each one's module, and what has been.
    assert five.disk - one.disk == (2 * 5 - 1) * 10 * 4096 * 4 * 64


def test_independent_modules_are_held_as_many_as_there_is_room_for(folder: Path) -> None:
    """Of several processes: what one has got, and what it has led of all that are to be sent, which is all of them
    where the text is one batch."""
    for batches, gpus, room, held in (
        (1, 1, 10**9, 5), (1, 1, 3, 3), (1, 5, 10**9, 6), (1, 2, 2 * 3, 3), (1, 2, 2 * 5, 5), (1, 2, 2 * 2, 0),
        (10, 5, 10**9, 2), (10, 2, 2 * 3, 3), (10, 3, 3 * 3, 1.2 + 1), (10, 3, 3 * 2, 0),
    ):  # fmt: skip
        tokens = batches * 4096
        size = tokens * 4 * 64
        config = ConversionConfig.of(
            CHOICES
            | {"across": "independent", "tokens": tokens - 128, "heldout": 128, "max_memory": room * size}
        ).resolved(torch.device("cpu"))
        amounts = Amounts.of(open_subject(folder, config), config, processes=gpus)
        assert amounts.activations_held == pytest.approx(held * size)
        assert amounts.spills == (held == 0)


def test_the_last_phase_has_no_use_for_more_processes_than_sequences_of_a_step(folder: Path) -> None:
    flops = [of(planned(folder, gpus=n, end_to_end=65536))["end-to-end"].flops for n in (1, 2, 8, 16)]
    assert flops[0] == 2 * flops[1] == 8 * flops[2] == pytest.approx(16 * flops[3])
    flops = [of(planned(folder, gpus=n, end_to_end=65536, sequence=256))["end-to-end"].flops for n in (1, 2)]
    assert flops[0] == 2 * flops[1]
    with pytest.raises(DLRError, match="16 sequences of calibration text are fewer than the 17 processes"):
        planned(folder, gpus=17)


def test_a_mixtures_experts_are_dealt_out_whole_and_its_attack_is_one_process(tmp_path: Path) -> None:
    """Four equal experts are two rounds on two GPUs and on three, and one on four and on any more."""
    source = save_tiny("mixtral", tmp_path / "source")
    choices = {"expert_tokens": 64}
    one = of(planned(source, **choices))
    # The attack on one expert has the half of the text that two of four experts are given: 320 of 640 tokens.
    config = ConversionConfig.of(CHOICES | choices).resolved(torch.device("cpu"))
    attacked = [chains.spec for chains in Amounts.of(open_subject(source, config), config).chains]
    assert one["redistilling"].wide == sum(
        12 * spec.params * 64 * len(INITS)
        + regression_flops(spec, 320, half_of(spec))
        + 2 * spec.params * 640
        for spec in attacked
    )
    for gpus, rounds in ((2, 2), (3, 2), (4, 1), (8, 1)):
        plan = planned(source, gpus=gpus, **choices)
        more = of(plan)
        assert more["distilling"].fit == one["distilling"].fit * rounds / 4
        assert more["distilling"].muon == one["distilling"].muon * rounds / 4
        assert more["redistilling"].fit == one["redistilling"].fit
        assert f"experts are dealt out whole, {rounds} of 4 at most to one" in plan.advice[0]
        # Each token has two experts, whose x and y go elsewhere but for the process's own, and so do chains.
        chains = sum(module["params"] for module in plan.modules)
        sent = 2 * (640 / gpus * 2 * 4 * 64) + chains * 4
        assert more["distilling"].sent == pytest.approx(sent * (1 - 1 / gpus))
        # 16 and 4 sequences of 32 tokens; what its experts get is held besides, with all tokens' routing.
        own = (-(-16 // gpus) - (-4 // gpus)) * 32
        held = own * (12 * 64 + 12 * 2) + 640 * 24 * 2 + rounds * 320 * 4 * 64
        base = one["distilling"].host - 640 * (12 * 64 + 12 * 2)
        assert more["distilling"].host - held == pytest.approx(base)
        spilt = of(planned(source, gpus=gpus, max_memory=1000, **choices))["distilling"].disk
        assert spilt - one["distilling"].disk == pytest.approx(
            gpus * (own * (12 * 64 + 12 * 2) + rounds * 320 * 4 * 64)
        )


def test_what_more_gpus_would_bring_was_tried(folder: Path) -> None:
    choices = {"train_tokens": 2**22, "redistill": 0.0, "layers": "0-3"}
    one, two, four = (planned(folder, gpus=gpus, **choices) for gpus in (None, 2, 4))
    for less, more in ((one, two), (two, four)):
        share = f"--gpus {more.processes} (without what they exchange): {more.seconds / less.seconds:.0%} of the time"
        assert any(line.startswith(share) for line in less.advice), less.advice
    apart = planned(folder, gpus=2, across="independent", **choices).seconds / one.seconds
    assert any(
        line.startswith("--gpus 2 --across independent") and f"{apart:.0%} of the time" in line
        for line in one.advice
    )
    assert not any(
        "--gpus" in line for line in plan_conversion(folder, device="cpu", data="text.txt", **CHOICES).advice
    )


def test_what_each_sends_is_three_numbers_a_weight_and_step(folder: Path) -> None:
    """A sum of the gradients, which is two rounds, and a gathering of the updates, of all but one's own part."""
    choices = {"redistill": 0.0, "end_to_end": 65536}
    chains = sum(module["params"] for module in planned(folder).modules)
    for across, fits in (("sequential", 1024 / 64), ("independent", 0)):
        phases = of(planned(folder, gpus=4, across=across, **choices))
        assert phases["distilling"].sent == fits * 3 * 4 * chains * 3 / 4
        assert phases["end-to-end"].sent == 128 * 3 * 4 * chains * 3 / 4
    assert not any(phase.sent for phase in planned(folder, **choices).phases)


def test_what_is_not_reckoned_is_printed(folder: Path) -> None:
    for across, words in (("sequential", "what they exchange"), ("independent", "3 of 5 at most")):
        (section,) = plan_sections(planned(folder, gpus=2, across=across))
        note = section.notes[0]
        assert re.search(r"what they exchange, 0\.\d*[1-9] GB from each", note)
        assert "Not reckoned" in note and words in note and "On 2 GPUs, each NVIDIA H200" in section.text
    assert planned(folder, gpus=2).to_dict()["processes"] == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--device", "h200", "--gpus", "0"], "--gpus must be at least 1, not 0"),
        (["--device", "h200", "--gpus", "-2"], "--gpus must be at least 1, not -2"),
        (["--device", "cpu", "--gpus", "2"], "name a GPU by --device: h100, h200"),
    ],
)
def test_gpus_that_there_cannot_be_are_one_line(given: list[str], words: str, folder: Path) -> None:
    with pytest.raises(DLRError) as error:
        CliRunner().invoke(app, ["plan", str(folder), "--data", "text.txt", *given], catch_exceptions=False)
    assert words in str(error.value) and "\n" not in str(error.value)
