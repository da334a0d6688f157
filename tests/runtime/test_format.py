"""A checkpoint of format 1, written by version 0.1.0: it stays loadable, to the bit where the arithmetic allows it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dlr_lock
from dlr_lock.runtime import inspect, locked_modules, verify

FORMAT_1 = Path(__file__).parents[1] / "data" / "locked-format1"


@pytest.mark.parametrize("load", [dlr_lock.load, AutoModelForCausalLM.from_pretrained])
def test_a_checkpoint_of_format_1_gives_the_logits_that_it_gave(load) -> None:
    wanted = load_file(FORMAT_1.with_name("locked-format1-logits.safetensors"))
    model = load(FORMAT_1)
    assert len(locked_modules(model)) == 2
    with torch.no_grad():
        logits = model(input_ids=wanted["input_ids"].to(model.device)).logits
    assert (logits.cpu() - wanted["logits"]).abs().max() <= 1e-4


def test_it_verifies_and_says_what_it_is() -> None:
    assert verify(FORMAT_1) == []
    facts = inspect(FORMAT_1)
    assert facts["conversion"]["mlps"] == 2
    assert {spec["rank"] for spec in facts["lock"]["modules"].values()} == {16}
