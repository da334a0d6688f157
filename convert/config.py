"""Every choice of a conversion, with its default and its help: the command line is made from these fields.

Torch is imported where it is needed, for a page of help needs none of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..common.errors import DLRError
from ..common.memory import memory_bytes
from ..common.options import by_name, check_names, flag, known_name, option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..runtime import DLRSpec

INITS = ("mixed", "random")
ACROSS = ("sequential", "independent")
STARVED = ("nearest", "leave")

_WARMUP = 0.125  # share of the training tokens, and at most 150 steps
_DECAY = 0.5  # share of the training tokens, at the end, over which the rate falls to 0
_BATCH = 512  # tokens
_EXPERT_TOKENS = 2048
_ON_A_GPU = {"tokens": 8, "train_tokens": 20, "end_to_end": 64}  # times what an effort means on a CPU
_FIRST = 4 / 512  # share of a batch that is drawn from first tokens, beside those that come by chance

# Of an MLP with a gate. A chain that moves its state by a quarter as much fits it better, and without weight decay it
# is undone no sooner: layer 12 of SmolLM2 at 204,800 training tokens has a relative error of 0.186 at a scale of 1 and
# a decay of 0.03, 0.147 at 3 and none, 0.144 at 4. Of MLPs without a gate two layers of MiniLM disagree: the last has
# 0.026 at a scale of 1, 0.041 at 2, 0.071 at 4, the second 0.177 at 1, 0.149 at 4 (docs/experiments/lock-strength.md).
_GATED = {"scale": 4.0, "weight_decay": 0.0}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one module is distilled: how long, in which steps, and from where.

    Attributes:
        train_tokens: Training tokens, the same token counted each time that it is trained on.
        batch: Tokens of a step.
        init: 'mixed' for sums and differences of the teacher's reading directions, or 'random'; see distill.py.
        seed: Of the initialisation and of the batches.
        rate, momentum: Muon's.
        scale: The output scale in units of y; a smaller one makes the chain move its state by more. See _GATED.
        preconditioner_exponent: Of the preconditioner of A and G, see `reading_preconditioner`; 0 for none.
        lr_multiplier_b: B's learning rate over that of A and G.
        weight_decay: Muon's.

    Raises:
        DLRError: On values that make no sense.
    """

    train_tokens: int
    batch: int = _BATCH
    init: str = "mixed"
    seed: int = 0
    rate: float = 0.012
    momentum: float = 0.95
    scale: float = 1.0
    preconditioner_exponent: float = 0.2
    lr_multiplier_b: float = 2.0
    weight_decay: float = 0.03

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise DLRError(f"unknown init {self.init!r}; one of {', '.join(INITS)}")
        for name, low, high in (
            ("rate", 1e-6, 100.0), ("momentum", 0.0, 0.999), ("scale", 1e-3, 1e3),
            ("preconditioner_exponent", 0.0, 1.0), ("lr_multiplier_b", 1e-3, 1e3), ("weight_decay", 0.0, 1.0),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise DLRError(f"{name} must be from {low:g} to {high:g}, not {getattr(self, name):g}")
        if self.batch < 1 or self.train_tokens < self.batch:
            raise DLRError(
                f"{self.train_tokens} training tokens are not even one batch of {self.batch} tokens"
            )

    def schedule(self, trained: float) -> float:
        """The share of the peak learning rate after so many training tokens: up, flat, down to 0."""
        done = trained / self.train_tokens
        warmup = min(_WARMUP, 150 * self.batch / self.train_tokens)
        return min(1.0, done / warmup, (1 - done) / _DECAY)

    def batches(self, tokens: int, first: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Rows of the calibration text for every step, without replacement within an epoch.

        A few in each batch are first tokens of their sequences: these carry the massive activations of some layers
        and are rare (one in 512).

        Args:
            tokens: How many rows there are.
            first: [F] int64, the rows that are first tokens.
            generator: What the draws are made with.

        Yields:
            [b] int64, b <= `batch`, until the training tokens are spent.
        """
        import torch

        left = self.train_tokens
        order = torch.empty(0, dtype=torch.int64)
        while left > 0:
            size = min(self.batch, left, tokens)
            # 4 of 512; of a small batch now and then one
            chance = torch.rand((), generator=generator).item()
            extra = int(size * _FIRST + chance) if len(first) else 0
            if len(order) < size - extra:
                order = torch.randperm(tokens, generator=generator)
            rows, order = order[: size - extra], order[size - extra :]
            left -= size
            if extra:
                rows = torch.cat([rows, first[torch.randint(len(first), (extra,), generator=generator)]])
            yield rows


@dataclass(frozen=True, slots=True)
class Effort:
    """What an effort stands for on a CPU.

    Attributes:
        words: What it takes and gives, for a user.
        tokens: Tokens of calibration text.
        train_tokens: Training tokens of a module.
        end_to_end: Training tokens of the end-to-end phase.
        redistill: The attacker's training tokens as a share of a module's.
    """

    words: str
    tokens: int
    train_tokens: int
    end_to_end: int
    redistill: float

    def on(self, device: torch.device) -> Effort:
        """The same for a device: a GPU has time for more."""
        if device.type == "cpu":
            return self
        return replace(
            self,
            **{name: times * getattr(self, name) for name, times in _ON_A_GPU.items()},
        )


# The words are of a 135M model on two CPU cores; the error is the relative one on held-out text.
EFFORTS = {
    "quick": Effort("half a minute a layer, error 0.20: a first look", 81_920, 102_400, 0, 0.0),
    "standard": Effort("three minutes a layer, error 0.14: for a few layers", 163_840, 409_600, 0, 0.25),
    "best": Effort(
        "about half an hour a layer, and an hour or two at the end",
        491_520,
        1_638_400,
        262_144,
        1.0,
    ),
}


# benchmarks/results/cpu-amd-epyc/fidelity-model-20261122T004657.json, 204,800 training tokens a module, and
# fidelity-model-20261129T235041.json, 102,400.
ERRORS_ADD_UP = (
    "errors add up over layers: of SmolLM2-135M's thirty, six cost 0.9% of the loss, and all thirty 16%, at "
    "standard's training tokens; 30% at quick's"
)


def _by_effort(name: str) -> str:
    return f"{by_name(EFFORTS, name)}; on a GPU {_ON_A_GPU[name]} times as many"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionConfig:
    """The choices of `convert_model`; None means that `resolved` chooses, by the effort and the machine.

    Every field says in its help what it is; `dlr-lock convert --help` prints them all.
    """

    layers: str | None = option(
        None,
        "Which layers: 12-17, 2-5,9, or auto:6 for the six that cost the model least, as `dlr-lock layers` foretells "
        f"it; {ERRORS_ADD_UP}.",
        "all",
    )
    mlps: str | None = option(
        None, "Regular expression of MLP module names, for models not recognised.", "found by structure"
    )
    depth: int | None = option(
        None, "Steps of a chain, near to this at equal parameters.", "by size: 12 for a 135M model, 37 for 8B"
    )
    rank: int | None = option(None, "Rank of a step, a multiple of 16.", "what equal parameters leave")
    lanes: int = option(1, "Chains side by side in a module.")
    act: str = option("silu", "Activation of the steps, by transformers' name.")
    params: float = option(1.0, "Parameters of a chain over those of its MLP.")
    init: str = option(
        "mixed",
        "mixed: from sums and differences of what the MLP's units read. random: from nothing of the MLP, fits worse.",
    )
    data: str = option("self", "Calibration text: .txt, .jsonl, .parquet, a datasets name, or self.")
    effort: str = option(
        "standard",
        "quick, standard or best: how long each layer is trained, and what else is not given below. It does not make "
        "up for too many layers.",
    )
    tokens: int | None = option(None, "Tokens of calibration text.", _by_effort("tokens"))
    heldout: int | None = option(
        None,
        "Tokens of calibration text that are kept back to measure on.",
        "an eighth of --tokens, from 512 to 10,240",
    )
    train_tokens: int | None = option(
        None, "Training tokens of each module's distillation.", _by_effort("train_tokens")
    )
    end_to_end: int | None = option(
        None,
        "Training tokens of the end-to-end phase, all chains at once, of what follows --tokens in the text as far as "
        "there is more; 0 for none.",
        _by_effort("end_to_end"),
    )
    redistill: float | None = option(
        None,
        "Training tokens of the attack on each module, as a share of the conversion's; 0 for none.",
        by_name(EFFORTS, "redistill"),
    )
    sequence: int | None = option(
        None, "Tokens a sequence of calibration text.", "512, or what the model takes"
    )
    across: str | None = option(
        None,
        "sequential: modules correct one another's errors; independent: they do not.",
        "sequential, where the model allows it",
    )
    expert_tokens: int | None = option(
        None,
        "Tokens of calibration text that each expert of a mixture is fitted on, at least.",
        f"{_EXPERT_TOKENS}",
    )
    starved: str = option(
        "nearest",
        "Experts that the router gives fewer: nearest (tokens that it scores highest for them, too) or leave (as is).",
    )
    batch: int | None = option(None, "Tokens a batch.", str(_BATCH))
    seed: int = option(0, "Seed of initialisations, batches and sampled text.")
    temperature: float = option(1.0, "Temperature of text sampled by --data self.")
    dtype: str = option("auto", "Of the checkpoint: auto (the source's), float32, bfloat16, float16.")
    device: str | None = option(None, "cpu, cuda, cuda:1, ...", "the best there is")
    max_memory: int | str | None = option(
        None,
        "For activations, and as much again for weights on a CPU, such as 4GiB; beyond it both lie on the disk.",
        "a quarter of the machine's memory",
    )

    @classmethod
    def of(cls, choices: dict[str, Any]) -> ConversionConfig:
        """The choices by name. Raises DLRError on a name that there is not, with today's name of an old one."""
        check_names(choices, cls, RENAMED, GONE)
        return cls(**choices)

    def resolved(self, place: torch.device | None = None) -> ConversionConfig:
        """The same with every None that depends on the machine filled in. Raises DLRError on bad values.

        place: The device, of another machine maybe; None to look for `device` here.
        """
        from ..common.dtypes import DTYPES
        from ..runtime.device import usable_device
        from ..triton_kernels import ACTIVATIONS

        device = usable_device(self.device) if place is None else place
        layers = "all" if self.layers is None else self.layers.strip().lower()
        named: dict[str, Any] = {
            "effort": known_name(self.effort, EFFORTS, "effort"),
            "init": known_name(self.init, INITS, "init"),
            "starved": known_name(self.starved, STARVED, "way with starved experts"),
            "across": self.across and known_name(self.across, ACROSS, "way across the layers"),
            "dtype": known_name(self.dtype, ("auto", *DTYPES), "dtype"),
            "act": known_name(self.act, sorted(ACTIVATIONS), "activation"),
            "layers": None if layers == "all" else layers,
            "data": "self" if str(self.data).lower() == "self" else self.data,
        }
        effort = EFFORTS[named["effort"]].on(device)
        for name in (
            "tokens", "heldout", "train_tokens", "batch", "lanes", "depth", "rank", "sequence", "expert_tokens",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DLRError(f"{flag(name)} must be at least 1, not {value}")
        if not 0 <= self.seed < 2**62:
            raise DLRError(f"--seed must be from 0 to {2**62 - 1}, not {self.seed}")
        if not 1e-3 <= self.temperature <= 1e3:
            raise DLRError(f"--temperature must be from 0.001 to 1000, not {self.temperature:g}")
        if not 0.1 <= self.params <= 10:
            raise DLRError(f"--params must be from 0.1 to 10 times the MLP's, not {self.params:g}")
        if self.end_to_end is not None and self.end_to_end < 0:
            raise DLRError(f"--end-to-end must not be negative, not {self.end_to_end}")
        if self.redistill is not None and not 0 <= self.redistill <= 100:
            raise DLRError(
                f"--redistill must be from 0 to 100 times the conversion's training tokens, not {self.redistill:g}"
            )
        tokens = self.tokens or effort.tokens
        chosen = replace(
            self,
            **named,
            tokens=tokens,
            heldout=self.heldout or max(512, min(10_240, tokens // 8)),
            train_tokens=self.train_tokens or effort.train_tokens,
            end_to_end=effort.end_to_end if self.end_to_end is None else self.end_to_end,
            redistill=effort.redistill if self.redistill is None else self.redistill,
            batch=self.batch or _BATCH,
            expert_tokens=self.expert_tokens or _EXPERT_TOKENS,
            device=str(device),
            max_memory=memory_bytes(self.max_memory),
        )
        chosen.recipe(gated=True)  # raises on what makes none
        return chosen

    def recipe(self, *, gated: bool) -> Recipe:
        """How an MLP with a gate, or without one, is distilled, for a resolved configuration.

        Raises:
            DLRError: On values that make no sense.
        """
        own: dict[str, Any] = _GATED if gated else {}
        return Recipe(int(self.train_tokens or 0), int(self.batch or 0), self.init, self.seed, **own)

    def spec_for(self, hidden_size: int, params: int) -> DLRSpec:
        """The chain for an MLP of so many parameters. Raises DLRError where the choices make none."""
        from ..runtime import DLRSpec

        return DLRSpec.of_params(
            hidden_size,
            round(params * self.params),
            lanes=self.lanes,
            depth=self.depth,
            rank=self.rank,
            act=self.act,
        )

    def to_dict(self) -> dict[str, Any]:
        """The choices by name, as a report repeats them."""
        return asdict(self)


# What choices were called in 0.1, and why one is gone: whoever still says so is told.
RENAMED = {"visits": "train_tokens", "together": "end_to_end", "unlock": "redistill", "start": "init"}
GONE = {
    "gated": "gated steps were measured as no lock and fit 3% worse (docs/experiments/lock-strength.md)",
}
