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
from ..convert.outlook.checks import check_choices, check_sequences
from ..convert.outlook.phases import Phase, dealt_modules, exchange_words, phases, sent_by_each
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
        processes: How many do it, on a GPU each. Phases, FLOPs and memory are those of one of these, see `phases`.
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
    processes: int
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
        """The machine's memory that a process takes at the peak, in bytes."""
        return self.base + max(phase.host for phase in self.phases)

    @property
    def device(self) -> float:
        """The GPU's at the peak."""
        return max(phase.device for phase in self.phases)

    @property
    def disk(self) -> float:
        """Files of all processes at the peak, the source's included."""
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
            for k in ("source", "processes", "options", "modules", "mlps", "params", "tokens", "advice")
        }
        return own | totals | {"program_bytes": self.base, "machine": asdict(self.rates), "phases": rows}


def plan_conversion(
    source: str | Path, *, device: str | None = None, gpus: int | None = None, **options: Any
) -> Plan:
    """Plans a conversion from config.json and the headers of the weight files alone.

    Args:
        source: A transformers directory or a hub id.
        device: As for a conversion, or a GPU that is not here, of `GPUS`: its rates are then reckoned.
        gpus: How many such GPUs, all in one machine, with a process each; None for one process.
        **options: The fields of `ConversionConfig`.

    Raises:
        DLRError: On everything that the user can correct.
    """
    named = device is not None and str(device).strip().lower() in GPUS
    try:
        place = torch.device("cuda") if named else usable_device(device)
    except DLRError as error:
        raise DLRError(f"{error}; or name a GPU that is not here: {NAMES}") from error
    if gpus is not None and gpus < 1:
        raise DLRError(f"--gpus must be at least 1, not {gpus}")
    if gpus is not None and place.type != "cuda":
        raise DLRError(
            f"--gpus {gpus}: this would be a plan for {place}, and processes there are no GPUs: leave --gpus out, or "
            f"name a GPU by --device: {NAMES}"
        )
    processes = gpus or 1
    asked = ConversionConfig.of(options)
    config = asked.resolved(place)
    subject = open_subject(source, config, here=not named)
    memory = gpu_rates(str(device)).memory if named else _memory(place)
    amounts = _amounts(subject, config, memory, processes)
    rates = gpu_rates(str(device)) if named else _probe(place, subject, amounts)
    base = resident_bytes()
    made = Plan(
        subject.name,
        processes,
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
    return replace(made, advice=[*_warnings(made, amounts), *_advice(made, config, amounts, again)])


def _amounts(subject: Subject, config: ConversionConfig, memory: float | None, processes: int) -> Amounts:
    """Raises DLRError on what a conversion would refuse."""
    folder = Path(subject.name).expanduser()
    # Of the hub's repositories the weights alone are looked at, and an adapter's words may be its base's.
    words = not folder.is_dir() or has_words(folder) or is_adapter(folder)
    made = Amounts.of(subject, config, memory, processes)
    check_choices(
        config,
        subject.model,
        subject.mlps,
        subject.every,
        size=made.whole_bytes,
        whole=not made.on_demand,
        words=words,
    )
    check_sequences((made.tokens - made.held) // made.length, processes)
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
    gpus: int | None = None,
    **changes: Any,
) -> Plan:
    """The same plan with other choices."""
    config = replace(asked, **changes).resolved(place)
    subject = replace(subject, mlps=stand_ins(subject.every, config.layers))
    return replace(made, phases=phases(_amounts(subject, config, memory, gpus or made.processes)))


def _warnings(made: Plan, amounts: Amounts) -> Iterator[str]:
    if made.processes > 1:
        yield _how_divided(amounts, sent_by_each(amounts))
    if automatic(made.options["layers"]):
        yield (
            f"the layers of --layers {made.options['layers']} are chosen by the weights, which no plan reads: it is "
            f"reckoned for layers {ranges({module['layer'] for module in made.modules})}"
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


def _how_divided(a: Amounts, sent: float) -> str:
    """What several processes do together in a plan, and what of it is not reckoned. sent: bytes, by each."""
    missing = ["that all of them read one disk"]
    if a.sequential:
        how = (
            "tokens are divided, and with them activations and a batch's rows, and the optimizer's blocks (a matrix of "
            "a student that is not cut is one); the preconditioner, the attack's regression and the memory of the "
            "model and of a fit are not"
        )
        if experts := [c for c in a.chains if c.count > 1]:
            most = max(a.fits(c)[0] for c in experts)
            how += (
                f"; a mixture's experts are dealt out whole, {most} of {max(c.count for c in experts)} at most to one, "
                "and the attack on one of them is one process's"
            )
        missing += [
            "that a step waits for who has most of its rows",
            "that smaller products are slower",
        ]
    else:
        dealt = dealt_modules(a, a.subject.mlps, a.processes)
        how = (
            "the text up to the modules is divided, and what goes in and out of a module sent to the process that fits "
            f"it; modules are dealt out whole, {max(map(len, dealt))} of {len(a.chains)} at most to one"
        )
    if sent:
        apart = f" ({flag('across')} independent has none of it in its fits)" if a.sequential else ""
        missing.insert(0, f"what they exchange, {exchange_words(sent)}{apart}")
    return (
        f"{a.processes} processes (torchrun --nproc-per-node {a.processes}), planned is the one with most to do: {how}"
        "; each reads the source, and the first alone does the text, foretelling, writing and measuring the model; the "
        f"disk is that of all. Not reckoned, for nothing is measured: {', '.join(missing)}"
    )


def _advice(made: Plan, config: ConversionConfig, amounts: Amounts, again: Any) -> Iterator[str]:
    """What would halve the time or the memory, each tried on the plan itself."""
    layers = {module["layer"] for module in made.modules}
    half = middle(layers, len(layers) // 2)
    if half and automatic(config.layers):
        half = f"auto:{len(layers) // 2}"
    efforts = list(EFFORTS)
    weaker = efforts[max(0, efforts.index(config.effort) - 1)]
    apart = flag("across") + " independent (modules do not correct one another)"
    exchanging = " (without what they exchange)" if amounts.sequential else ""
    several = {"gpus": max(2, made.processes), "across": "independent"}
    tries: list[tuple[str, dict[str, Any]]] = [
        (
            f"{flag('gpus')} {2 * made.processes}{exchanging}",
            {"gpus": 2 * made.processes} if amounts.on_gpu else {},
        ),
        (
            apart if made.processes > 1 else f"{flag('gpus')} 2 {apart}",
            several if amounts.on_gpu and amounts.sequential else {},
        ),
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
        if not changes or all(
            getattr(config, name, made.processes) == value for name, value in changes.items()
        ):
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
