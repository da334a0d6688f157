"""What a conversion did: as figures for --json and the manifest, as sections for the terminal and the model card."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..common.hub import HUB_NAME
from ..reporting import Section, Table, headings
from ..reporting.layers import over_layers
from ..reporting.lock_verdict import Judgement, LockVerdict, Redistillation, lock_status, undoing_figures
from ..reporting.markdown import markdown
from ..reporting.words import bytes_words, cell
from ..runtime import DLRExperts, DLRNet, DLRSpec, ExpertsSpec
from ..runtime.experts import spec_from
from .config import EFFORTS, ConversionConfig
from .evaluate import Evaluation, Fidelity, StateEvaluation
from .layer_runner import LayerRunner
from .outlook.sensitivity import Foretold, between


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One locked module.

    Attributes:
        train_tokens: Training tokens of its distillation.
        seconds: Of the distillation alone.
        drift: How far the locked model's hidden states are from the original's behind the layer, the mean over tokens
            of |locked - original|^2 / |original|^2; None where modules were distilled independently.
        redistillation: The attack on it, where that was measured.
        notes: What the owner should know of it, a sentence each.
    """

    module: str
    layer: int
    spec: DLRSpec | ExpertsSpec
    params_original: int
    fidelity: Fidelity
    train_tokens: int
    seconds: float
    drift: float | None = None
    redistillation: Redistillation | None = None
    notes: tuple[str, ...] = ()

    @property
    def judgement(self) -> Judgement:
        """Whether the chain is a lock, and by what."""
        return _judged(self.fidelity.to_dict(), self.redistillation)

    @property
    def verdict(self) -> LockVerdict:
        """Whether the chain is a lock."""
        return self.judgement.verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; those of the fidelity stand beside the others."""
        values = _plain(self)
        follows = {
            "verdict": self.verdict.value,
            "locked": self.verdict.locked,
            "params_locked": self.spec.params,
        }
        return values | values.pop("fidelity") | follows

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModuleReport":
        """The inverse of `to_dict`."""
        own: dict[str, Any] = {f.name: values.get(f.name) for f in fields(cls)}
        own |= {"spec": spec_from(values["spec"]), "notes": tuple(values["notes"])}
        own["fidelity"] = Fidelity(**{f.name: values[f.name] for f in fields(Fidelity)})
        if attack := values["redistillation"]:
            own["redistillation"] = Redistillation.from_dict(attack)
        return cls(**own)


@dataclass
class Modules:
    """The fitted chains of a model.

    Attributes:
        chains: By module name, in the checkpoint's dtype on the CPU; read from the disk each time that one is
            asked for, until the end-to-end phase has changed them.
        reports: One a chain, in model order.
        across: 'sequential' or 'independent', as it was done.
        runner: Of the original's layers, where these can be run one at a time and that was asked for.
    """

    chains: Mapping[str, DLRNet | DLRExperts]
    reports: list[ModuleReport]
    across: str
    runner: LayerRunner | None = None


@dataclass(frozen=True, slots=True)
class EndToEndReport:
    """The end-to-end phase and the figures before and after it.

    Attributes:
        train_tokens, seconds: What it took.
        smallest_gap_before, smallest_gap_after: The smallest flatten gap of any module, over |chain|^2, on the locked
            model's own held-out activations.
        weakest: The module of the smallest gap after it.
        redistillation_before, redistillation_after: The attack on that module, on the original's activations; None
            where no attack was asked for.
    """

    train_tokens: int
    seconds: float
    evaluation_before: Evaluation | StateEvaluation
    evaluation_after: Evaluation | StateEvaluation
    smallest_gap_before: float
    smallest_gap_after: float
    weakest: str
    redistillation_before: Redistillation | None = None
    redistillation_after: Redistillation | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return _plain(self)


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """A conversion.

    Attributes:
        out: The checkpoint.
        options: Every choice that led to it.
        mlps: How many MLPs the original has, locked or not, and mixtures of experts.
        params_original, params_locked: Of the whole models.
        evaluation: The locked model against the original on held-out text.
        seconds: Of the whole conversion, earlier runs of an interrupted one up to their last finished parts.
        across: 'sequential' or 'independent', as it was done.
        end_to_end: The phase, where there was one.
        foretold: What the locked layers were reckoned to cost before the fits, where that was done.
        warnings: What the owner should know, a sentence each.
        program: Versions by name.
        licence: The source's, as fields of a model card's metadata; empty where it says none.
    """

    source: str
    out: str
    options: dict[str, Any]
    modules: list[ModuleReport]
    mlps: int
    params_original: int
    params_locked: int
    evaluation: Evaluation | StateEvaluation
    seconds: float
    across: str
    end_to_end: EndToEndReport | None = None
    foretold: Foretold | None = None
    warnings: list[str] = field(default_factory=list)
    program: dict[str, str] = field(default_factory=dict)
    licence: dict[str, str] = field(default_factory=dict)

    @property
    def not_the_original(self) -> str | None:
        """What its owner must know of a model that is too far from the original; None where it is not."""
        return ruined(self.evaluation.to_dict())

    @property
    def not_locked(self) -> list[str]:
        """The converted modules that are known to be no lock."""
        return [m.module for m in self.modules if m.verdict.refuted]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return _plain(self) | {"not_locked": self.not_locked, "not_the_original": self.not_the_original}


def _plain(report: ModuleReport | EndToEndReport | ConversionReport) -> dict[str, Any]:
    """Its fields by name, each in plain values, seconds rounded."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return value.to_dict() if hasattr(value, "to_dict") else value

    values = {f.name: plain(getattr(report, f.name)) for f in fields(report)}
    return values | {"seconds": round(report.seconds, 2)}


RUINED_KL = (
    0.5  # nats a token: of the models seen, one of 0.12 loses 2.5% of the loss, one of 1.64 half of it
)


def ruined(evaluation: Mapping[str, Any]) -> str | None:
    """A warning where a model's KL to its original, by the name of "kl", is above RUINED_KL; None elsewhere."""
    kl = evaluation.get("kl")
    if kl is None or kl <= RUINED_KL:
        return None
    return (
        f"this model is not the original any more: its KL to it is {kl:.2f} nats a token, above {RUINED_KL}; lock "
        "fewer layers (--layers), or train longer on more text (--train-tokens, --tokens)"
    )


_LOAD = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")"""
_LOAD_OTHER = """\
import dlr_lock

model = dlr_lock.load("path/to/this/directory")"""
_TARGETS = {
    "sequential": "what brings the locked model's hidden states back to the original's",
    "independent": "the MLP's output in the original",
}
_TEMPLATE = """\
---
{metadata}
---

# {title}, locked
{warning}
```sh
pip install dlr-lock  # or, in its source tree: pip install .
```

```python
{load}
```

{locked} of the {mlps} MLPs of this model are DLR-Nets: deep chains of low-rank steps that run like an MLP and are
expensive to train. Where the package dlr-lock is installed, every program that loads models with transformers loads
this one; without it, loading stops at weights of another shape.

{sections}

## What the lock does not stop

Whoever has the original weights needs nothing from this checkpoint. Tuning that leaves the chains alone
(adapters on attention, prompts), training with recomputation of activations, and distilling each chain back
into an MLP all remain possible; the tables above say what the last costs.

## How it was made

{recipe}
"""


def model_card(report: ConversionReport) -> str:
    """The README.md of a converted checkpoint, in Markdown."""
    options, versions = report.options, (f"{name} {version}" for name, version in report.program.items())
    # the hub refuses a card whose base_model could not be a repository's name
    base = {"base_model": report.source} if HUB_NAME.fullmatch(report.source) else {}
    metadata = {**base, **report.licence}
    return _TEMPLATE.format(
        # JSON strings are YAML strings, too
        metadata="\n".join(
            [
                "library_name: transformers",
                "tags: [dlr-lock]",
                *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in metadata.items()),
            ]
        ),
        warning=f"\n> **Warning:** {words}.\n" if (words := report.not_the_original) else "",
        title=report.source.rstrip("/").rsplit("/", 1)[-1],
        locked=len(report.modules),
        mlps=report.mlps,
        load=_LOAD if isinstance(report.evaluation, Evaluation) else _LOAD_OTHER,
        sections=markdown(conversion_sections(report)),
        recipe=f"{_recipe(options)}; layers {options['layers'] or 'all'}, modules {report.across}, seed "
        f"{options['seed']}, weights in {options['dtype']}. Made with {', '.join(versions)}.",
    )


def choices(config: ConversionConfig) -> str:
    """What a conversion with a resolved configuration will do, in a sentence."""
    weights = " and as much for weights" if str(config.device) == "cpu" else ""
    shape = f"{config.depth}x{config.rank}" if config.depth and config.rank else "depth and rank to match"
    return (
        f"{_recipe(config.to_dict())}; layers {config.layers or 'all'}, {config.lanes} lane(s), {shape}; on "
        f"{config.device}, {bytes_words(int(config.max_memory or 0))} for activations{weights}. On a CPU "
        f"this effort means {EFFORTS[config.effort].words}."
    )


def _recipe(options: Mapping[str, Any]) -> str:
    together = f", then {options['end_to_end']:,} of all chains at once" if options["end_to_end"] else ""
    return (
        f"Effort {options['effort']}: {options['tokens']:,} tokens of calibration text ({options['data']}); "
        f"{options['train_tokens']:,} training tokens a module in batches of {options['batch']:,}{together}; "
        f"{options['init']} initialisation"
    )


def conversion_sections(report: ConversionReport) -> list[Section]:
    """The lock, its fidelity and the modules, for the terminal and the model card alike."""
    ratio = report.params_locked / report.params_original
    status = lock_status({m.module: m.judgement for m in report.modules})
    lock = Section(
        "The lock",
        f"{status}\n{len(report.modules)} of {report.mlps} MLPs were converted in {report.seconds:.0f} s, "
        f"with {report.modules[0].train_tokens:,} training tokens each. Parameters: {report.params_locked:,} (original "
        f"{report.params_original:,}, ratio {ratio:.4f}).",
        notes=[
            *(f"{warning.rstrip('.')}." for warning in report.warnings),
            *(
                f"{m.module} has {m.spec.params:,} parameters instead of {m.params_original:,}."
                for m in report.modules
                if abs(m.spec.params / m.params_original - 1) > 0.01
            ),
        ],
    )
    target = f"Figures are of held-out calibration text. The target of a chain is {_TARGETS[report.across]}."
    table = _modules({m.module: m.spec for m in report.modules}, [m.to_dict() for m in report.modules])
    fidelity = replace(evaluation_section(report.evaluation, report.foretold), text=_end_to_end(report))
    layers = over_layers([(m.module, m.fidelity.rel_error, m.fidelity.flatten_gap) for m in report.modules])
    return [lock, fidelity, *layers, Section("Modules", target, table)]


def facts_sections(facts: Mapping[str, Any]) -> list[Section]:
    """What `inspect` found: the chains, what was measured of them, and where they are from."""
    made = facts.get("conversion", {"modules": []})
    origin = "There is no manifest: this checkpoint was saved again after its conversion."
    if made["modules"]:
        origin = (
            f"Made by {facts['program']} from {made['source']} (fingerprint {made['fingerprint'][:16]}): "
            f"{len(made['modules'])} of {made['mlps']} MLPs were converted; {len(facts['files'])} files."
        )
    specs = {name: spec_from(spec) for name, spec in facts["lock"]["modules"].items()}
    if made["modules"] and (words := ruined(made.get("evaluation") or {})):
        origin = f"Warning: {words}.\n{origin}"
    if made["modules"]:
        origin = lock_status({m["module"]: _judged(m, _attack(m)) for m in made["modules"]}) + "\n" + origin
    return [Section("Locked modules", origin, _modules(specs, made["modules"]))]


def _modules(specs: Mapping[str, DLRSpec | ExpertsSpec], measured: Iterable[Mapping[str, Any]]) -> Table:
    """A row a chain. measured: what `ModuleReport.to_dict` says of it, or a manifest, which may be older."""
    found = {m["module"]: m for m in measured}
    rows = []
    for name, spec in specs.items():
        m = found.get(name, {})
        attack = _attack(m)
        undoing = undoing_figures(attack.attempts, attack.conversion).values() if attack else ("-", "-")
        rows.append((
            name, str(spec), *(cell(m.get(figure), ".4f") for figure in ("rel_error", "first_error")),
            cell(m.get("flatten_gap"), ".2f"), cell(m.get("coupling"), ".2f"), cell(m.get("drift"), ".4f"),
            str(_judged(m, attack)) if m else "-", *map(str, undoing),
            cell(m.get("train_tokens"), ","), cell(m.get("seconds"), ".0f"),
        ))  # fmt: skip
    columns = headings(
        "module | chain | relative error | first tokens | flatten gap | coupling | hidden states | verdict | "
        "undoing / conversion | undoing / fresh | training tokens | seconds"
    )
    return Table(columns, rows, minor=("first tokens", "training tokens")).filled()


def _attack(m: Mapping[str, Any]) -> Redistillation | None:
    """The attack on a module, from what `ModuleReport.to_dict` says of it, or an older manifest."""
    return Redistillation.from_dict(m["redistillation"]) if m.get("redistillation") else None


def _judged(fidelity: Mapping[str, Any], attack: Redistillation | None) -> Judgement:
    attempts = attack.attempts if attack else []
    return Judgement.of(fidelity["rel_error"], fidelity["flatten_gap"], attempts)


def evaluation_section(e: Evaluation | StateEvaluation, foretold: Foretold | None = None) -> Section:
    """An evaluation as a table, and what was foretold of it."""
    columns = ("", "locked", "original", "difference")
    rows = [(what, *cells) for what, _, *cells in _figures(e)]
    if foretold:
        rows += [
            ("KL foretold (without an end-to-end phase)", "", "", foretold.kl_words),
            ("loss foretold (likewise)", "", "", f"+{between(foretold.loss_gap_between)}"),
        ]
    terms = [name for name in distances(e) if name != "loss gap"]  # which is the loss's difference here
    terms += ["loss", "perplexity"] if isinstance(e, Evaluation) else []
    title = f"Fidelity on {e.tokens:,} tokens of held-out text"
    return Section(title, table=Table(columns, rows).filled(), terms=terms)


def texts_section(evaluations: Mapping[str, Evaluation]) -> Section:
    """Several texts' evaluations, by the texts' names."""
    rows = [
        (name, f"{e.tokens:,}", f"{e.loss:.4f}", cell(e.original_loss, ".4f"), *distances(e).values())
        for name, e in evaluations.items()
    ]
    columns = ("text", "tokens", "loss", "original's", *distances(next(iter(evaluations.values()))))
    return Section("Text by text", table=Table(columns, rows).filled())


def evaluation_words(e: Evaluation | StateEvaluation) -> str:
    """An evaluation in a sentence."""
    facts = []
    for what, _, locked, original, difference in _figures(e):
        beside = f"original {original}" + (f", difference {difference}" if difference else "")
        facts.append(f"{what} {locked} ({beside})" if original else f"{what} {locked or difference}")
    return f"{'; '.join(facts)}; over {e.tokens:,} tokens of held-out text."


def distances(e: Evaluation | StateEvaluation) -> dict[str, str]:
    """What an evaluation says of the distance to the original, by the short names that the legend explains."""
    return {short: difference for _, short, _, _, difference in _figures(e) if short}


def _figures(e: Evaluation | StateEvaluation) -> list[tuple[str, str, str, str, str]]:
    """(what, its short name as a distance, locked, original, difference), "" where there is none."""
    if isinstance(e, StateEvaluation):
        return [
            ("relative error of the last hidden states", "state error", "", "", f"{e.state_error:.4f}"),
            ("cosine of mean-pooled sequences", "cosine", "", "", f"{e.cosine:.4f}"),
        ]
    loss, perplexity = (
        ("loss (nats a token)", "loss gap", f"{e.loss:.4f}"),
        ("perplexity", "", f"{e.perplexity:.2f}"),
    )
    if e.original_loss is None or e.loss_gap is None or e.kl is None or e.flips is None:
        return [(*loss, "", ""), (*perplexity, "", "")]
    return [
        (*loss, f"{e.original_loss:.4f}", f"{e.loss_gap:+.4f}"),
        (*perplexity, f"{e.original_perplexity:.2f}", ""),
        ("KL to the original (nats a token)", "KL", "", "", f"{e.kl:.4f}"),
        ("likeliest token flipped", "flips", "", "", f"{100 * e.flips:.1f}%"),
    ]


def _end_to_end(report: ConversionReport) -> str:
    """The phase in a paragraph, "" where there was none."""
    t = report.end_to_end
    if t is None:
        return ""
    attacks = ""
    if t.redistillation_before and t.redistillation_after:
        attacks = (
            f" The redistillation of {t.weakest}, which has the smallest gap now, came to '{t.redistillation_before}' "
            f"before and to '{t.redistillation_after}' now."
        )
    return (
        f"The last {t.train_tokens:,} training tokens trained all chains together on the original's output. Before: "
        f"{evaluation_words(t.evaluation_before)} The smallest flatten gap of a module, over |chain|^2, was "
        f"{t.smallest_gap_before:.2f} before and is {t.smallest_gap_after:.2f} now.{attacks} The table of modules is "
        "of before this phase, but for the verdict on a chain that was undone after it."
    )
