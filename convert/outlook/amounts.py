"""The sizes that all phases of a conversion are reckoned from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ...common.dtypes import DTYPES
from ...common.hooks import is_paired
from ...runtime import DLRSpec
from ...runtime.generation import positions
from ..activations.capture import group_layers
from ..activations.dealt import at_once, most_led, waves
from ..config import ConversionConfig, Recipe
from ..data import SEQUENCE_LENGTH
from ..evaluate import BATCH as SEQUENCES
from ..evaluate import elements_at_once, predicts_next, sequences_at_once
from ..experts.routing import Mixture
from ..mlp_matching import MLP
from ..redistill import INITS, attack_tokens, half_of, student_recipe
from ..source import Source, weight_files
from .subject import Subject


@dataclass(frozen=True, slots=True)
class Chains:
    """What takes one module's place: a chain, or one for each expert of a mixture.

    Attributes:
        mlp: The module.
        spec: Of one chain.
        count: How many there are.
        recipe: Of one chain's fit.
        tokens: That one chain is fitted to.
    """

    mlp: MLP
    spec: DLRSpec
    count: int
    recipe: Recipe
    tokens: float

    @classmethod
    def of(cls, config: ConversionConfig, mlp: MLP, tokens: int) -> Chains:
        """As a conversion makes them of `tokens` tokens to train on, of which a mixture's router gives each expert as
        many as the others."""
        recipe = config.recipe(gated=mlp.gated)
        if not isinstance(mlp, Mixture):
            return cls(mlp, config.spec_for(mlp.hidden_size, mlp.params), 1, recipe, tokens)
        own = max(tokens * mlp.chosen / mlp.experts, min(config.expert_tokens or 0, tokens))
        share = max(recipe.batch, round(recipe.train_tokens * own / tokens))
        spec = config.spec_for(mlp.hidden_size, mlp.expert_params)
        return cls(mlp, spec, mlp.experts, replace(recipe, train_tokens=share), own)

    @property
    def params(self) -> int:
        """Of all of them."""
        return self.count * self.spec.params

    @property
    def active(self) -> int:
        """Parameters that a token meets."""
        return self.spec.params * (self.mlp.chosen if isinstance(self.mlp, Mixture) else 1)

    @property
    def replaced(self) -> float:
        """Parameters that a token meets of what was there before."""
        mlp = self.mlp
        return mlp.params * mlp.chosen / mlp.experts if isinstance(mlp, Mixture) else mlp.params

    def __str__(self) -> str:
        return str(self.spec) if self.count == 1 else f"{self.count} of {self.spec}"


def reckoned(source: Source, mlps: list[MLP], every: list[MLP], config: ConversionConfig) -> Amounts:
    """Of a conversion whose model is read.

    Args:
        source: The model.
        mlps: The MLPs to be converted, in model order.
        every: All that it has.
        config: Resolved.
    """
    files = sum(file.stat().st_size for file in weight_files(source.path))
    subject = Subject(source.name, source.model, mlps, every, source.dtype, files)
    device = torch.device(str(config.device))
    gpu_memory = float(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else None
    return Amounts.of(subject, config, gpu_memory)


@dataclass(frozen=True)
class Amounts:
    """The sizes that all phases are reckoned from.

    Attributes:
        subject: The model.
        config: Resolved.
        chains: What takes the place of each MLP.
        gpu_memory: Of the GPU that the work is done on, in bytes; None for a CPU.
        parts: Threads of a CPU.
        processes: How many of one machine do this together, as `parallel` tells. Amounts are those of one of them.
    """

    subject: Subject
    config: ConversionConfig
    chains: list[Chains]
    gpu_memory: float | None
    parts: int
    processes: int = 1

    @classmethod
    def of(
        cls, subject: Subject, config: ConversionConfig, gpu_memory: float | None = None, processes: int = 1
    ) -> Amounts:
        """Raises DLRError where the configuration makes no chain for an MLP."""
        made = cls(subject, config, [], gpu_memory, 1 if gpu_memory else torch.get_num_threads(), processes)
        train = max(1, made.tokens - made.held)
        return replace(made, chains=[Chains.of(config, mlp, train) for mlp in subject.mlps])

    @property
    def on_gpu(self) -> bool:
        """Whether the work is done on a GPU."""
        return self.gpu_memory is not None

    @property
    def length(self) -> int:
        """Tokens of a sequence, n."""
        longest = positions(self.subject.model.config) or SEQUENCE_LENGTH
        return self.config.sequence or min(SEQUENCE_LENGTH, longest)

    @property
    def held(self) -> int:
        """Held-out tokens."""
        return max(1, int(self.config.heldout or 0) // self.length) * self.length

    @property
    def tokens(self) -> int:
        """Tokens of text, held out or not."""
        return int(self.config.tokens or 0) // self.length * self.length + self.held

    @property
    def spread(self) -> int:
        """How many processes the text of a module is dealt out to: all where modules correct one another."""
        return self.processes if self.sequential else 1

    def fits(self, chains: Chains) -> tuple[int, int]:
        """How many of a module's chains one process fits, and how many processes fit one together: where modules
        correct one another all fit an MLP's, and each those of the experts that are dealt to it."""
        return -(-chains.count // self.spread), self.spread if chains.count == 1 else 1

    def rows(self, chains: Chains) -> float:
        """Tokens that one of a module's chains is fitted to or judged on."""
        mlp = chains.mlp
        return chains.tokens + self.held * (mlp.chosen / mlp.experts if isinstance(mlp, Mixture) else 1)

    def own(self, size: int) -> tuple[int, int]:
        """Of text that is dealt out to `size` processes, the first one's tokens and how many of them are held out."""
        train, held = (
            -(-tokens // (self.length * size)) * self.length
            for tokens in (self.tokens - self.held, self.held)
        )
        return train + held, held

    @property
    def layer_flops(self) -> float:
        """FLOPs of a token in a layer: its matrices, and attention to a whole sequence; a decoder's also to what its
        encoder read."""
        text = self.subject.model.config.get_text_config()
        heads = getattr(text, "num_attention_heads", 0) or getattr(text, "num_heads", 1)
        own = getattr(text, "head_dim", 0) or getattr(text, "d_kv", 0) or self.hidden // heads
        attentions = 1.5 if is_paired(self.subject.model) else 1
        return 2 * self.subject.body_matrices / self.layers + attentions * 4 * self.length * heads * own

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return len(self.subject.layers)

    @property
    def hidden(self) -> int:
        """d."""
        return self.subject.mlps[0].hidden_size

    @property
    def pass_flops(self) -> float:
        """FLOPs of a token through the model, chances of the next one included."""
        head = self.subject.vocabulary * self.hidden if predicts_next(self.subject.model) else 0
        return self.layers * self.layer_flops + 2 * head

    @property
    def locked_flops(self) -> float:
        """The same through the locked model."""
        return self.pass_flops + 2 * sum(c.active - c.replaced for c in self.chains)

    @property
    def stored_itemsize(self) -> int:
        """Bytes of a number in the checkpoint."""
        return (DTYPES.get(self.config.dtype) or self.subject.dtype).itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of a weight where it is computed with: float32 on a CPU, as it is stored on a GPU."""
        return self.subject.dtype.itemsize if self.on_gpu else 4

    @property
    def room(self) -> float:
        """Bytes that weights may take."""
        return self.gpu_memory / 2 if self.gpu_memory else float(int(self.config.max_memory or 0))

    @property
    def whole_bytes(self) -> int:
        """The model's weights, all of them, as they are computed with."""
        return self.subject.params * self.itemsize

    @property
    def on_demand(self) -> bool:
        """Whether weights come and go, for the model is larger than its room."""
        return self.whole_bytes > self.room

    @property
    def model_bytes(self) -> float:
        """The model's weights where it runs: all of them, or as many as there is room for and the two largest parts."""
        if not self.on_demand:
            return self.whole_bytes
        layer = max(sum(p.numel() for p in part.parameters()) for part in self.subject.layers)
        table = self.subject.vocabulary * self.hidden
        # With the file's own numbers of the part that is being read, where they are of another dtype.
        reading = self.subject.dtype.itemsize if self.itemsize != self.subject.dtype.itemsize else 0
        least = self.itemsize * (max(layer, table) + layer) + reading * max(layer, table)
        return min(self.whole_bytes, max(self.room, least))

    @property
    def fused_bytes(self) -> float:
        """Experts that transformers fuses when it reads them: these lie in the machine's memory, not in files."""
        fused = sum(mlp.params for mlp in self.subject.every if isinstance(mlp, Mixture))
        return fused * self.subject.dtype.itemsize if self.on_demand else 0

    @property
    def checkpoint_bytes(self) -> float:
        """The checkpoint to be written."""
        swapped = sum(c.params - c.mlp.params for c in self.chains)
        return (self.subject.params + swapped) * self.stored_itemsize

    @property
    def chain_bytes(self) -> float:
        """All chains, as they are kept on the disk."""
        return sum(c.params for c in self.chains) * self.stored_itemsize

    @property
    def sequential(self) -> bool:
        """Whether modules correct one another; of models that do not allow it encoder-decoders alone are known here."""
        return self.config.across != "independent" and not is_paired(self.subject.model)

    def groups(self, hands: Sequence[Sequence[MLP]]) -> list[list[MLP]]:
        """Which MLPs share a pass, where modules are independent. hands: each process's."""
        if self.processes == 1:
            return group_layers(hands[0], self.tokens, self._for_activations)
        return [[mlp for hand in wave for mlp in hand] for wave in waves(hands, self._at_once(hands))]

    @property
    def _evenly(self) -> list[list[MLP]]:
        """The modules of each process, if all took as long."""
        return [self.subject.mlps[rank :: self.processes] for rank in range(self.processes)]

    def _at_once(self, hands: Sequence[Sequence[MLP]]) -> int:
        return at_once(hands, self.tokens, self.batch_tokens, self._for_activations)

    @property
    def batch_tokens(self) -> int:
        """Of text that is dealt out in batches to all processes, the first one's tokens."""
        return most_led(self.tokens, self.length, self.processes)

    @property
    def _for_activations(self) -> int:
        """Bytes of memory that they may take."""
        return int(self.config.max_memory or 0) // self.processes

    @property
    def activation_bytes(self) -> float:
        """Both streams in float32, and x and y in 16 bits; of one module alone where modules are independent. With the
        routing of a mixture."""
        routed = max((mlp.chosen for mlp in self.subject.mlps if isinstance(mlp, Mixture)), default=0)
        tokens, _ = self.own(self.spread)
        return tokens * ((12 if self.sequential else 4) * self.hidden + 12 * routed)

    @property
    def spills(self) -> bool:
        """Whether activations lie on the disk."""
        if self.sequential or self.processes == 1:
            return self.activation_bytes > self._for_activations
        return not self._at_once(self._evenly)

    @property
    def spilled(self) -> float:
        """Bytes of them on the disk, of all processes."""
        if not self.spills:
            return 0
        if self.sequential:
            return self.processes * self.activation_bytes
        busy = min(self.processes, len(self.subject.mlps))
        # What is to be sent of each process's module, and what has been.
        return busy * (1 + (self.processes > 1)) * self.activation_bytes

    @property
    def activations_held(self) -> float:
        """What of them is in memory: of independent modules as many as there is room for."""
        if self.spills:
            return 0
        if self.sequential:
            return self.activation_bytes
        if self.processes == 1:
            room = int(self._for_activations // self.activation_bytes)
            return min(room, len(self.subject.mlps)) * self.activation_bytes
        hands = self._evenly
        each = min(self._at_once(hands), len(hands[0]))
        led = sum(map(bool, hands)) * self.batch_tokens / self.tokens  # of one module of each process
        return (each * max(1.0, led) + 1) * self.activation_bytes

    @property
    def experts_held(self) -> tuple[float, float]:
        """Bytes of what the experts that are dealt to one process are fitted to, of the largest mixture: x and y in 16
        bits, in memory or, of all processes, on the disk; and all processes' routing."""
        if self.spread == 1:
            return 0, 0
        dealt = routed = 0.0
        for chains in self.chains:
            if isinstance(chains.mlp, Mixture):
                dealt = max(dealt, 4.0 * self.hidden * self.fits(chains)[0] * self.rows(chains))
                # Of each choice its weight and expert, and both once more by expert.
                routed = max(routed, 24.0 * self.tokens * chains.mlp.chosen)
        if self.activation_bytes + dealt > self._for_activations:
            return routed, self.spread * dealt
        return routed + dealt, 0

    @property
    def logit_bytes(self) -> float:
        """Of a pass with chances: two models' logits in float32, and a part's chances with what they are made of."""
        if not predicts_next(self.subject.model):
            return 0
        row = 4 * self.length * self.subject.vocabulary
        at_once = sequences_at_once(self.length, self.subject.vocabulary, SEQUENCES)
        part = elements_at_once(torch.device("cuda" if self.on_gpu else "cpu"))
        return 2.5 * at_once * row + 5 * 4 * min(part, at_once * row / 4)

    def students(self, attacked: Chains) -> Iterator[tuple[DLRSpec, Recipe]]:
        """What the attack on a module fits: each student's shape and recipe. Of a mixture it attacks one expert."""
        spec = attacked.spec
        count = attack_tokens(self.config.redistill or 0, attacked.recipe.train_tokens)
        for init in INITS:
            student = DLRSpec(spec.hidden_size, 1, 1, spec.lanes * spec.depth * spec.rank, spec.act)
            if init == "linear":
                half = half_of(spec)
                steps = -(-spec.depth // half)
                student = DLRSpec(spec.hidden_size, spec.lanes, steps, half * spec.rank, spec.act)
            if init == "random":
                student = DLRSpec.of_params(spec.hidden_size, spec.params, depth=1, act="silu", gated=True)
            yield student, student_recipe(count, init)
