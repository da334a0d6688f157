"""What many models are compared with runs once: the same figures, and its body is not run again."""

import pytest
import torch
from attacked import locked_llama
from tiny import tiny_model

from dlr_lock.audit.reference import Reference
from dlr_lock.convert.evaluate import compare


@pytest.mark.parametrize("arch", ["llama", "t5", "bert"])
def test_the_figures_are_those_of_a_plain_comparison(arch: str) -> None:
    original = tiny_model(arch)
    other = locked_llama() if arch == "llama" else tiny_model(arch, seed=7)
    tokens = torch.arange(20 * 16).view(20, 16) % 300 + 1
    reference = Reference(original, tokens)
    wanted = compare(other, original, tokens)
    assert reference.compare(other) == wanted == reference.compare(other)
    assert compare(other, original, tokens) == wanted


def test_the_body_runs_once() -> None:
    original = tiny_model("llama")
    seen: list[int] = []
    original.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    reference = Reference(original, torch.arange(20 * 16).view(20, 16) % 300)
    for _ in range(3):
        reference.compare(locked_llama())
    assert len(seen) == 3  # batches of 8 sequences
