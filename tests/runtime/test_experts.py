"""Locked mixtures of experts: what DLRExperts compute, and that they are saved and loaded as dense locks are."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from locked import lock_randomly
from safetensors import safe_open
from tiny import MIXTURES, VOCABULARY, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dlr_lock import DLRError, backend, load
from dlr_lock.runtime import DLRExperts, DLRSpec, ExpertsSpec
from dlr_lock.runtime.experts import one_expert
from dlr_lock.runtime.generation import generate
from dlr_lock.runtime.quantizer import locked_experts
from dlr_lock.triton_kernels import chain_reference


def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=ids()).logits


def random_experts(
    experts: int, d: int = 32, kept: tuple[int, ...] = (), stock: nn.Module | None = None
) -> DLRExperts:
    chains = DLRExperts(ExpertsSpec(DLRSpec(d, 1, 3, 16), experts, kept), stock)
    own = {n: torch.randn_like(p) / 4 if "dlr_kept" not in n else p for n, p in chains.named_parameters()}
    chains.assign(own)
    return chains


@pytest.mark.parametrize("arch", MIXTURES)
@pytest.mark.parametrize("kept", [(), (1,)], ids=["all", "one kept"])
def test_a_locked_mixture_is_loaded_as_it_was_saved(arch: str, kept: tuple[int, ...], tmp_path: Path) -> None:
    """By plain from_pretrained, and saved and loaded once more; the router is the original's."""
    tiny_model(arch).save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    routers = {n: p for n, p in model.named_parameters() if "router" in n or ".gate." in n}
    lock_randomly(model, kept=kept)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "locked")
    once = AutoModelForCausalLM.from_pretrained(tmp_path / "locked", dtype=torch.float32)
    assert torch.equal(logits(once), wanted)
    once.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert torch.equal(logits(load(tmp_path / "again", device="cpu")), wanted)
    assert routers and all(torch.equal(once.get_parameter(name), p) for name, p in routers.items())
    assert json.loads((tmp_path / "locked" / "config.json").read_text())["quantization_config"]["format"] == 2
    with safe_open(tmp_path / "locked" / "model.safetensors", "pt") as file:
        stock = [n for n in file.keys() if "expert" in n and "dlr_" not in n and "shared" not in n]  # noqa: SIM118
        assert all(
            file.get_slice(name).get_shape() == [1] for name in stock
        )  # tripwires are all that is left
    assert generate(once, tiny_tokenizer(), "The river", max_new_tokens=3) is not None


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss", "granitemoe"])
def test_transformers_alone_stops(arch: str, tmp_path: Path) -> None:
    """At a tripwire, whether experts are stored one by one, fused, or under another name."""
    model = tiny_model(arch)
    lock_randomly(model)
    model.save_pretrained(tmp_path / "locked")
    load_it = (
        "import sys; from transformers import AutoModelForCausalLM as M; M.from_pretrained(sys.argv[1]);"
        "print('dlr_lock' in sys.modules)"
    )
    alone = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", load_it, tmp_path / "locked"],
        env=alone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "ignore_mismatched_sizes" in done.stderr and "dlr-lock" in done.stderr


def test_each_token_goes_through_its_experts_chains() -> None:
    chains = random_experts(4)
    x, weight = torch.randn(9, 32), torch.rand(9, 2)
    index = torch.stack([torch.randperm(5)[:2] for _ in range(9)])  # 4 is none
    wanted = torch.zeros(9, 32, dtype=torch.float64)
    for token in range(9):
        for expert, share in zip(index[token].tolist(), weight[token].double(), strict=True):
            if expert < 4:
                chain = chains.chains.chain(expert).to(torch.float64)
                wanted[token] += share * chain_reference(x[token].double(), chain)
    with torch.no_grad():
        assert torch.allclose(chains(x, index, weight).double(), wanted, atol=1e-5)
        assert torch.allclose(chains(x, top_k_index=index, top_k_weights=weight).double(), wanted, atol=1e-5)


def test_tokens_stacked_by_expert() -> None:
    """As Llama 4 has them: rows of zeros are tokens that are not routed there, and give nothing."""
    chains = random_experts(3)
    x = torch.randn(3, 5, 32)
    x[1, 2:] = 0
    with torch.no_grad():
        y = chains(x.flatten(0, 1)).view(3, 5, 32)
    assert not y[1, 2:].any()
    for expert in range(3):
        rows = slice(0, 2) if expert == 1 else slice(0, 5)
        wanted = chain_reference(x[expert, rows], chains.chains.chain(expert))
        assert torch.allclose(y[expert, rows], wanted, atol=1e-5)


def test_a_kept_expert_is_the_originals() -> None:
    stock = tiny_model("gpt_oss").model.layers[0].mlp.experts
    chains = random_experts(4, 64, (0, 2), stock)
    x = torch.randn(6, 64)
    for expert in range(4):
        index = torch.full((6, 1), expert)
        with torch.no_grad():
            y, original = chains(x, index, torch.ones(6, 1)), one_expert(stock, expert, x)
        assert torch.allclose(y, original, atol=1e-6) == (expert in (0, 2))


def test_gradients_by_the_definition_alone() -> None:
    chains = random_experts(4).requires_grad_()
    x, index, weight = torch.randn(9, 32), torch.randint(4, (9, 2)), torch.rand(9, 2)
    with pytest.raises(RuntimeError, match="no backward"):
        chains(x, index, weight)
    with backend("naive"):
        chains(x, index, weight).square().sum().backward()
    used = index.unique()
    assert chains.dlr_A.grad is not None and chains.dlr_A.grad[used].flatten(1).any(1).all()


def test_scales_stay_in_float32() -> None:
    chains = random_experts(2).bfloat16()
    assert (
        chains.dlr_A.dtype == torch.bfloat16
        and chains.dlr_scale.dtype == chains.dlr_bias.dtype == torch.float32
    )


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"experts": 0}, "whole number"),
        ({"kept": (4,)}, "below 4"),
        ({"kept": (2, 1)}, "ascending"),
        ({"kept": (0, 1, 2, 3)}, "has no chains"),
        ({"chain": DLRSpec(32, 2, 3, 16)}, "one lane"),
    ],
)
def test_no_mixture(values: dict[str, Any], why: str) -> None:
    with pytest.raises(DLRError, match=why):
        ExpertsSpec(**{"chain": DLRSpec(32, 1, 3, 16), "experts": 4, **values})


def test_a_description_is_read_back() -> None:
    spec = ExpertsSpec(DLRSpec(32, 1, 3, 16), 4, (1, 3))
    assert ExpertsSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    for wrong in ({"experts": 4}, {**spec.to_dict(), "more": 1}):
        with pytest.raises(DLRError):
            ExpertsSpec.from_dict(wrong)


def test_what_is_locked_is_listed() -> None:
    model = tiny_model("deepseek_v3")
    chains = lock_randomly(model)
    assert [name for name, _ in locked_experts(model)] == [
        n for n, c in chains.items() if isinstance(c, DLRExperts)
    ]
