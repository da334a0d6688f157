"""Whole models of random weights: an original, and the same with chains in its MLPs' places."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dlr_lock.convert.end_to_end import with_chains
from dlr_lock.runtime import DLRNet, DLRSpec, lock

POSITIONS = 8192


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama's sizes. chains: lanes x depth of those that are tried, each at equal parameters."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    chains: tuple[tuple[int, int], ...]

    @property
    def mlps(self) -> list[str]:
        """The names of the MLPs' modules."""
        return [f"model.layers.{n}.mlp" for n in range(self.layers)]

    def specs(self) -> list[DLRSpec]:
        return [
            DLRSpec.matching(self.hidden, self.intermediate, mlp_gated=True, lanes=lanes, depth=depth)
            for lanes, depth in self.chains
        ]


# SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B. First the chain that a conversion makes, then one of eight lanes.
SHAPES = (
    ModelShape("135M", 576, 1536, 30, 9, 3, 49152, True, ((1, 12), (8, 18))),
    ModelShape("1B", 2048, 8192, 16, 32, 8, 128256, True, ((1, 16), (8, 48))),
    ModelShape("8B", 4096, 14336, 32, 32, 8, 128256, False, ((1, 37), (8, 56))),
)
TINY = (ModelShape("tiny", 64, 160, 2, 4, 2, 320, True, ((1, 6),)),)


def original(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, layers: int | None = None
) -> PreTrainedModel:
    """The original, in evaluation mode. layers: fewer than the shape has."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=POSITIONS,
    )
    torch.manual_seed(0)
    with torch.device(device):  # 8B parameters drawn on a CPU take minutes
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def locked(model: PreTrainedModel, shape: ModelShape, spec: DLRSpec) -> PreTrainedModel:
    """A copy of the original that shares all weights but the chains', whose updates are about half of x of unit RMS."""
    return with_chains(model, _chains(model, shape, spec), [])


@torch.no_grad()
def save_both(
    shape: ModelShape, spec: DLRSpec, dtype: torch.dtype, device: torch.device, folder: Path
) -> tuple[Path, Path]:
    """Writes a locked model and its original, without tokenizers, into a folder; returns both's directories."""
    ours, theirs = folder / "locked", folder / "original"
    model = original(shape, dtype, device)
    model.save_pretrained(theirs)
    lock(model, _chains(model, shape, spec), [])
    model.save_pretrained(ours)
    return ours, theirs


def _chains(model: PreTrainedModel, shape: ModelShape, spec: DLRSpec) -> dict[str, DLRNet]:
    device, dtype = model.device, model.dtype
    source = torch.Generator(device).manual_seed(1)
    chains = {}
    for name in shape.mlps:
        net = DLRNet(spec, dtype=dtype, device=device)
        for weight in net.weight_names(spec):
            over = spec.depth * spec.rank if weight == "dlr_B" else spec.hidden_size
            getattr(net, weight).normal_(std=over**-0.5, generator=source)
        net.dlr_scale.fill_(1 / math.sqrt(spec.lanes))
        net.prepare()
        chains[name] = net
    return chains


def read_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a step reads: all but the table of embeddings, where the head has one of its own."""
    total = sum(p.nbytes for p in model.parameters())
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return total if table is head else total - table.nbytes
