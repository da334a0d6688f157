"""Every choice of an audit. Torch is imported where it is needed, for a page of help needs none of it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..common.errors import DLRError
from ..common.memory import memory_bytes
from ..common.options import by_name, check_names, known_name, option

if TYPE_CHECKING:
    from .attacks.fine_tune import Tuning

INVENTED, TOPICS = "invented", "topics"  # the bundled task, the bundled neutral text


@dataclass(frozen=True, slots=True)
class Budget:
    """What an attacker may spend, and how well it is measured.

    Attributes:
        tokens, heldout: Tokens of neutral text, to distil chains back on and to measure on.
        shares: Training tokens of redistilling a chain, over those of its conversion.
        experts: Experts of a mixture whose chains are distilled back, at most.
        tuning, batch, sequence: Training tokens of a fine-tune, tokens of a step, tokens of a sequence.
        task_heldout: Tokens of the task that a fine-tune is judged by.
        seeds, rates: Runs at the best rate, and rates tried, at most.
        timed: Whether the asymmetry is timed, too.
    """

    tokens: int
    heldout: int
    shares: str
    experts: int
    tuning: int
    batch: int
    sequence: int
    task_heldout: int
    seeds: int
    rates: int
    timed: bool


BUDGETS = {
    "quick": Budget(32_768, 4_096, "0.0625", 8, 4_096, 256, 128, 512, 2, 4, timed=False),
    "full": Budget(409_600, 10_240, "0.0625,0.25,1", 64, 262_144, 2_048, 512, 8_192, 3, 6, timed=True),
}

# As they are registered, which takes torch: for the help alone.
ATTACKS = ("full", "LoRA", "outside", "PEFT", "MeZO")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig:
    """The choices of `audit_model`; None means: as `budget` says.

    Every field says in its help what it is; `dlr-lock audit --help` prints them all. The texts are those of
    `texts.read_split`, a fine-tune's numbers those of `Budget`, the attacks those of `attacks.TRAINING_ATTACKS`.
    """

    budget: str = option("quick", "quick or full: what an attacker may spend, where not said below.")
    task: str = option(
        INVENTED, "Text to fine-tune on: .txt, .jsonl, .parquet, a datasets name, or invented."
    )
    data: str = option(TOPICS, "Neutral text, in the same forms, or topics: Python's documentation.")
    attacks: str | None = option(
        None, f"Attacks on training, some of {','.join(ATTACKS)}.", "those that fit the budget"
    )
    shares: str | None = option(
        None,
        "Training tokens of redistilling a chain, over its conversion's: 0.0625,1.",
        by_name(BUDGETS, "shares"),
    )
    experts: int | None = option(
        None,
        "Experts of a mixture whose chains are redistilled, those with the most tokens.",
        by_name(BUDGETS, "experts"),
    )
    tuning: int | None = option(None, "Training tokens of a fine-tune.", by_name(BUDGETS, "tuning"))
    batch: int | None = option(None, "Tokens a step of it.", by_name(BUDGETS, "batch"))
    sequence: int | None = option(None, "Tokens a sequence of it.", by_name(BUDGETS, "sequence"))
    seeds: int | None = option(None, "Runs at the best rate, at most.", by_name(BUDGETS, "seeds"))
    rates: int | None = option(None, "Rates tried, at most.", by_name(BUDGETS, "rates"))
    tokens: int | None = option(
        None, "Tokens of neutral text to redistill chains on.", by_name(BUDGETS, "tokens")
    )
    heldout: int | None = option(None, "Tokens of neutral text to measure on.", by_name(BUDGETS, "heldout"))
    seed: int = option(0, "Seed of runs and of the invented task.")
    device: str | None = option(None, "cpu, cuda, cuda:1, ...", "the best there is")
    max_memory: int | str | None = option(
        None, "For activations, such as 4GiB.", "a quarter of the machine's memory"
    )

    @classmethod
    def of(cls, choices: dict[str, Any]) -> AuditConfig:
        """The choices by name.

        Raises:
            DLRError: On a name that there is not, with today's name of an old one.
        """
        check_names(choices, cls)
        return cls(**choices)

    def resolved(self) -> AuditConfig:
        """The same with every None filled in.

        Raises:
            DLRError: On bad values.
        """
        from ..runtime.device import usable_device
        from .attacks import TRAINING_ATTACKS

        name = known_name(self.budget, BUDGETS, "budget")
        budget = asdict(BUDGETS[name])
        budget["attacks"] = ",".join(
            key for key, attack in TRAINING_ATTACKS.items() if name in attack.budgets
        )
        texts: dict[str, Any] = {
            "task": INVENTED if str(self.task).lower() == INVENTED else self.task,
            "data": TOPICS if str(self.data).lower() == TOPICS else self.data,
        }
        if self.attacks is not None:
            wanted = [known_name(part, TRAINING_ATTACKS, "attack") for part in self.chosen_attacks]
            texts["attacks"] = ",".join(wanted)
        chosen = replace(
            self,
            budget=name,
            **texts,
            **{k: v for k, v in budget.items() if k in self.__slots__ and getattr(self, k) is None},
            device=str(usable_device(self.device)),
            max_memory=memory_bytes(self.max_memory),
        )
        for name in ("tokens", "heldout", "tuning", "batch", "sequence", "seeds", "rates", "experts"):
            if getattr(chosen, name) < 1:
                raise DLRError(f"--{name} must be at least 1, not {getattr(chosen, name)}")
        assert chosen.sequence and chosen.batch and chosen.tuning
        if not 2 <= chosen.sequence <= chosen.batch <= chosen.tuning:
            raise DLRError(
                f"--sequence {chosen.sequence}, --batch {chosen.batch}, --tuning {chosen.tuning}: a sequence has 2 "
                "tokens or more, a step one sequence or more, a run one step or more"
            )
        if not 0 <= self.seed < 2**31:
            raise DLRError(f"--seed must be from 0 to {2**31 - 1}, not {self.seed}")
        if not chosen.chosen_shares:
            raise DLRError("--shares must name one share of the training tokens at least, such as 0.0625")
        return chosen

    @property
    def chosen_attacks(self) -> list[str]:
        """The attacks on training by name, in the order given, each once."""
        return list(dict.fromkeys(part.strip() for part in str(self.attacks).split(",")))

    @property
    def chosen_shares(self) -> list[float]:
        """The shares of a conversion's training tokens, in ascending order."""
        parts = [part.strip() for part in str(self.shares).split(",") if part.strip()]
        if not all(re.fullmatch(r"\d*\.?\d+", part) and 0 < float(part) <= 100 for part in parts):
            raise DLRError(f"--shares {self.shares}: numbers above 0 and at most 100, such as 0.0625,0.25")
        return sorted({float(part) for part in parts})

    @property
    def plan(self) -> Tuning:
        """How a resolved audit fine-tunes."""
        from .attacks.fine_tune import Tuning

        assert self.tuning and self.batch and self.seeds and self.rates
        return Tuning(self.tuning, self.batch, _LOOKS, self.seeds, self.rates)

    def to_dict(self) -> dict[str, Any]:
        """The choices that a report repeats."""
        return {name: getattr(self, name) for name in self.__slots__}


_LOOKS = 6  # at the held-out loss in a run
