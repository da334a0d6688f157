"""The plan of a conversion: its phases with seconds and bytes, and what would make it shorter or smaller."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..common.errors import DLRError
from ..common.options import flag
from ..convert.config import EFFORTS, ERRORS_ADD_UP, ConversionConfig
from ..convert.mlp_discovery import automatic, middle, ranges, stand_ins, unknown_mixtures
from ..convert.outlook.amounts import Amounts
from ..convert.outlook.checks import check_choices
from ..convert.outlook.phases import Phase, phases
from ..convert.outlook.subject import Subject
from ..convert.source import has_words
from ..convert.sources.adapters import is_adapter
from ..runtime.device import usable_device
from .gpus import GPUS, NAMES
from .rates import Rates, gpu_rates, probe
from .subject import open_subject


@dataclass(frozen=True)
class Plan:
    """What a conversion will take.

    Attributes:
        source: The model's name.
        options: Every choice, resolved.
        modules: Of each MLP to be converted: module, chain, parameters, training tokens.
        mlps: How many the model has.
        params: The model's parameters.
        tokens: Calibration tokens, held-out ones included.
        rates: The machine.
        phases: In their order.
        base: Bytes that the program itself holds.
        advice: What to change, a sentence each.
    """

    source: str
    options: dict[str, Any]
    modules: list[dict[str, Any]]
    mlps: int
    params: int
    tokens: int
    rates: Rates
    phases: list[Phase]
    base: int
    advice: list[str]

    @property
    def seconds(self) -> float:
        """Of the whole."""
        return sum(map(self.rates.seconds, self.phases))

    @property
    def host(self) -> float:
        """The machine's memory at the peak, in bytes."""
        return self.base + max(phase.host for phase in self.phases)

    @property
    def device(self) -> float:
        """The GPU's at the peak."""
        return max(phase.device for phase in self.phases)

    @property
    def disk(self) -> float:
        """Files at the peak, the source's included."""
        return max(phase.disk for phase in self.phases)

    @property
    def flops(self) -> float:
        """Of all phases."""
        return sum(phase.flops for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        rows = [asdict(p) | {"flops": p.flops, "seconds": self.rates.seconds(p)} for p in self.phases]
        totals = {
            "flops": self.flops, "seconds": self.seconds, "host_bytes": self.host, "device_bytes": self.device,
            "disk_bytes": self.disk,
        }  # fmt: skip
        own = {
            k: getattr(self, k)
            for k in ("source", "options", "modules", "mlps", "params", "tokens", "advice")
        }
        return own | totals | {"program_bytes": self.base, "machine": asdict(self.rates), "phases": rows}


def plan_conversion(source: str | Path, *, device: str | None = None, **options: Any) -> Plan:
    """Plans a conversion from config.json and the headers of the weight files alone.

    Args:
        source: A transformers directory or a hub id.
        device: As for a conversion, or a GPU that is not here, of `GPUS`: its rates are then reckoned.
        **options: The fields of `ConversionConfig`.

    Raises:
        DLRError: On everything that the user can correct.
    """
    named = device is not None and str(device).strip().lower() in GPUS
    try:
        place = torch.device("cuda") if named else usable_device(device)
    except DLRError as error:
        raise DLRError(f"{error}; or name a GPU that is not here: {NAMES}") from error
    asked = ConversionConfig.of(options)
    config = asked.resolved(place)
    subject = open_subject(source, config, here=not named)
    memory = gpu_rates(str(device)).memory if named else _memory(place)
    amounts = _amounts(subject, config, memory)
    rates = gpu_rates(str(device)) if named else _probe(place, subject, amounts)
    base = resident_bytes()
    made = Plan(
        subject.name,
        config.to_dict() | {"device": device if named else str(place)},
        [
            {
                "module": chains.mlp.module,
                "layer": chains.mlp.layer,
                "chain": str(chains),
                "params_original": chains.mlp.params,
                "params": chains.params,
                "train_tokens": chains.count * chains.recipe.train_tokens,
            }
            for chains in amounts.chains
        ],
        len(subject.every) + len(unknown_mixtures(subject.model, subject.every)),
        subject.params,
        amounts.tokens,
        rates,
        phases(amounts),
        base,
        [],
    )
    again = partial(_again, made, subject, asked, place, memory)
    return replace(made, advice=[*_warnings(made), *_advice(made, config, again)])


def _amounts(subject: Subject, config: ConversionConfig, memory: float | None) -> Amounts:
    """Raises DLRError on what a conversion would refuse."""
    folder = Path(subject.name).expanduser()
    # Of the hub's repositories the weights alone are looked at, and an adapter's words may be its base's.
    words = not folder.is_dir() or has_words(folder) or is_adapter(folder)
    made = Amounts.of(subject, config, memory)
    check_choices(
        config,
        subject.model,
        subject.mlps,
        subject.every,
        size=made.whole_bytes,
        whole=not made.on_demand,
        words=words,
    )
    return made


def _probe(place: torch.device, subject: Subject, amounts: Amounts) -> Rates:
    widest = max(amounts.chains, key=lambda chains: chains.spec.params)
    return probe(place, widest.spec, widest.recipe, widest.mlp.intermediate_size, subject.vocabulary)


def resident_bytes() -> int:
    """What this process holds now, in bytes; 0 where the system does not say."""
    try:
        found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def _memory(place: torch.device) -> float | None:
    """What a GPU that is here has free, in bytes."""
    return float(torch.cuda.mem_get_info(place)[0]) if place.type == "cuda" else None


def _again(
    made: Plan,
    subject: Subject,
    asked: ConversionConfig,
    place: torch.device,
    memory: float | None,
    **changes: Any,
) -> Plan:
    """The same plan with other choices."""
    config = replace(asked, **changes).resolved(place)
    subject = replace(subject, mlps=stand_ins(subject.every, config.layers))
    return replace(made, phases=phases(_amounts(subject, config, memory)))


def _warnings(made: Plan) -> Iterator[str]:
    if automatic(made.options["layers"]):
        yield (
            f"--layers {made.options['layers']} chooses by the weights, which no plan reads: it is reckoned for layers "
            f"{ranges({module['layer'] for module in made.modules})}"
        )
    if len(made.modules) > 1:
        yield (
            "how far the locked model will be from the original, `dlr-lock layers` foretells, from the weights; "
            f"{ERRORS_ADD_UP}"
        )
    memory = made.rates.memory
    if memory is not None and made.device > 0.95 * memory:
        yield (
            f"{made.device / 2**30:,.1f} GiB of the GPU's memory are wanted and a {made.rates.name} has "
            f"{memory / 2**30:,.0f}"
        )
    if made.options["data"] == "self":
        yield "--data self samples the calibration text from the model; --data with a text file takes no time for it"


def _advice(made: Plan, config: ConversionConfig, again: Any) -> Iterator[str]:
    """What would halve the time or the memory, each tried on the plan itself."""
    layers = {module["layer"] for module in made.modules}
    half = middle(layers, len(layers) // 2)
    efforts = list(EFFORTS)
    weaker = efforts[max(0, efforts.index(config.effort) - 1)]
    tries: list[tuple[str, dict[str, Any]]] = [
        (f"{flag('redistill')} 0 (no attack: whether a chain is a lock is not known)", {"redistill": 0.0}),
        (f"{flag('end_to_end')} 0", {"end_to_end": 0}),
        (
            f"{flag('train_tokens')} {int(config.train_tokens or 0) // 2} (a worse fit)",
            {"train_tokens": int(config.train_tokens or 0) // 2},
        ),
        (f"{flag('layers')} {half}", {"layers": half} if half else {}),
        (f"{flag('effort')} {weaker} (a worse fit)", {"effort": weaker})
        if weaker != config.effort
        else ("", {}),
        (
            f"{flag('tokens')} {int(config.tokens or 0) // 2} (less text)",
            {"tokens": int(config.tokens or 0) // 2, "heldout": config.heldout},
        ),
        (f"{flag('max_memory')} 1GiB (activations beyond it lie on the disk)", {"max_memory": 2**30}),
        (f"{flag('batch')} {int(config.batch or 0) // 2}", {"batch": int(config.batch or 0) // 2}),
    ]
    for words, changes in tries:
        if not changes or all(getattr(config, name) == value for name, value in changes.items()):
            continue
        try:
            other = again(**changes)
        except DLRError:
            continue
        time, host, device = (
            getattr(other, what) / (getattr(made, what) or 1) for what in ("seconds", "host", "device")
        )
        shares = [
            f"{share:.0%} of the {what}"
            for share, what in ((time, "time"), (host, "memory"), (device, "GPU's memory"))
            if 0 < share < 0.8
        ]
        if shares:
            yield f"{words}: {' and '.join(shares)}"
