"""An audit from end to end: both models, every attack, the verdicts, and the files that say so."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..common.dtypes import product_dtype
from ..common.errors import DLRError
from ..common.files import full_disk_is_an_error, hash_files, writable_folder, write_whole
from ..common.hub import model_folder
from ..common.machine import device_name, machine
from ..common.progress import Phase, Progress, expect, no_progress, say
from ..common.resume import ResumeStore, run_lock
from ..common.version import __version__
from ..convert.activations.calibrator import SequentialCalibrator
from ..convert.config import EFFORTS
from ..convert.data import digest, sequence_length
from ..convert.end_to_end import with_chains
from ..convert.evaluate import predicts_next
from ..convert.experts.routing import Mixture
from ..convert.mlp_discovery import find_mlps
from ..convert.mlp_matching import MLP
from ..convert.redistill import INITS
from ..convert.source import load_tokenizer, open_source, public_name
from ..runtime import DLRSpec, ExpertsSpec, inspect, load
from ..runtime.generation import check_vocabulary, positions
from ..runtime.quantizer import locked as every_chain
from .asymmetry import Asymmetry, DepthCost, asymmetries, depth_costs
from .attacks import TRAINING_ATTACKS
from .attacks.redistillation import Students, redistilled_modules
from .attacks.redistillation_rows import merged_row, redistillation_row
from .attacks.structural import kept_row, structural_rows
from .chains import chain_spec, fullest, in_places
from .config import BUDGETS, AuditConfig
from .context import AuditContext, ModelVariant
from .costs import count_steps, time_steps
from .gradients import TOKENS as GRADIENT_TOKENS
from .gradients import model_gradients, module_gradients
from .price import owners_price
from .report import AuditReport, GradientError, Run, StepCost
from .sections import page
from .strategies.slot import slot_variants
from .texts import Text, read_split
from .verdict import LOCKED, ORIGINAL, verdicts

THREAT = (
    "The attacker has the locked weights, this program and text of their own, but not the original's weights, and "
    "wants a model that is as good at a new task as the fine-tuned original would be."
)
_JSON, _PAGE = "audit.json", "audit.html"
_ATTACKS = 2  # to be raised where an attack of the same name does something else: then no part is reused
_SLOT_TOKENS = 1024
MERGED = "merge, by regression"


def audit_model(
    locked: str | Path,
    original: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
    **options: Any,
) -> AuditReport:
    """Runs the attacks on a locked checkpoint and its original, and writes audit.json and audit.html.

    Finished parts are kept in `<out>.partial`: the same call goes on from there after a failure or Ctrl-C. The same
    seed gives the same figures on the same machine, but for seconds.

    Args:
        locked: The locked checkpoint's directory.
        original: The model that was locked: a transformers directory, a hub id or a .gguf file.
        out: The folder for the two files.
        overwrite: Whether an audit that is there is replaced.
        progress: Called with (what is being done, done, total).
        options: The fields of `AuditConfig`.

    Raises:
        DLRError: On everything that the user can correct.
    """
    config = AuditConfig.of(options).resolved()
    target = Path(out).expanduser().absolute()
    _check(target, overwrite=overwrite)
    with run_lock(target):
        _check(target, overwrite=overwrite)  # again, now that nobody else writes
        return _audited(locked, original, target, config, progress)


def _audited(
    locked: str | Path, original: str | Path, target: Path, config: AuditConfig, progress: Progress
) -> AuditReport:
    began = time.monotonic()
    device = torch.device(str(config.device))
    folder = model_folder(locked)
    facts = inspect(folder)
    conversion = facts.get("conversion", {})
    progress("reading the models", 0, 2)
    ours = load(folder, dtype=torch.float32, device=device)
    progress("reading the models", 1, 2)
    source = open_source(original, dtype=torch.float32, device=device)
    progress("reading the models", 2, 2)
    every = find_mlps(source.model, conversion.get("options", {}).get("mlps"))
    mlps = _locked_mlps(ours, every)
    slots = [name for mlp in every for name in (mlp.module, *mlp.identity) if _is_module(source.model, name)]
    tokenizer = load_tokenizer(folder) or source.tokenizer
    neutral, task = _texts(ours, tokenizer, config)
    for part in (neutral.train, neutral.heldout, task.train, task.heldout):
        for model in (ours, source.model):
            check_vocabulary(part, model, tokenizer)
    about = {k: v for k, v in config.to_dict().items() if k not in ("device", "max_memory")}
    about |= {
        "locked": _digest(folder, facts),
        "original": source.fingerprint,
        "text": [digest(part) for text in (neutral, task) for part in (text.train, text.heldout)],
        # seconds of two machines, or of two thread counts, do not compare
        "machine": [device_name(device), torch.get_num_threads()],
        "program": __version__,
        "attacks": _ATTACKS,
    }
    resume = ResumeStore(target, about, began)
    with TemporaryDirectory() as scratch:
        context = AuditContext(
            locked=ours,
            original=source.model,
            mlps=mlps,
            slots=slots,
            neutral=neutral,
            task=task,
            config=config,
            scratch=Path(scratch),
            across=conversion.get("across", "sequential"),
            conversion=_conversion_tokens(mlps, conversion),
            resume=resume,
            progress=progress,
        )
        if conversion.get("fingerprint", source.fingerprint) != source.fingerprint:
            context.notes.append("the original is not the one that was locked: its files have other hashes")
        context.chains = fullest(context)
        found = _attack(context)
    report = AuditReport(
        locked=public_name(str(folder)),
        original=public_name(str(original)),
        options=config.to_dict() | {"task": task.source, "data": neutral.source},
        machine=machine(device),
        threat=THREAT,
        seconds=resume.seconds,
        notes=context.notes,
        **found,
    )
    report = replace(report, price=owners_price(report))
    with full_disk_is_an_error(target):
        text = json.dumps(report.to_dict(), indent=1, allow_nan=False)
        write_whole(target / _JSON, lambda path: path.write_text(text + "\n", encoding="utf-8"))
        write_whole(target / _PAGE, lambda path: path.write_text(page(report), encoding="utf-8"))
    resume.remove()
    return report


def _attack(context: AuditContext) -> dict[str, Any]:
    """Runs every attack; the fields of `AuditReport` that are found out."""
    train_tokens = _redistillations(context)
    _expect(context, train_tokens)
    measuring = context.count("measuring both models")
    fidelity = context.reference.compare(context.locked, measuring)
    rows = list(structural_rows(context))
    students = list(redistilled_modules(context, sorted(set(train_tokens.values()))))
    shorter = kept_row(context, MERGED, partial(merged_row, context, students, MERGED))
    undone = {
        name: kept_row(context, name, partial(redistillation_row, context, students, name, count))
        for name, count in train_tokens.items()
    }
    runs: list[Run] = []
    steps: list[StepCost] = []
    attacks = context.config.chosen_attacks
    if predicts_next(context.original):
        width = context.original.config.get_text_config().hidden_size
        if product_dtype(context.original.device, width) == torch.bfloat16:
            context.notes.append(
                "fine-tunes had products in bfloat16, with weights and sums in float32; steps were timed in float32"
            )
        variants = partial(_variants, context, train_tokens, students)
        for variant in variants():
            for attack in _tried(context, variant.name):
                runs += TRAINING_ATTACKS[attack].run(context, variant)
        steps = _step_costs(context, variants)
    else:
        context.notes.append("nothing was fine-tuned: the model has no language-model head to give a loss")
    redistillation = {
        name: {"flops": row.flops or 0, "seconds": row.seconds or 0} for name, row in undone.items()
    }
    found = verdicts(runs, steps, redistillation)
    if runs and not found:
        context.notes.append("no verdict: the original gained no more on the task than its seeds differ by")
    first = context.mlps[0]
    of_which = "an expert of " if isinstance(first, Mixture) else ""
    spec = chain_spec(dict(every_chain(context.locked))[first.module].spec)
    return {
        "fidelity": fidelity,
        "structural": [*rows, shorter, *undone.values()],
        "modules": [figures for figures, _ in students],
        "runs": runs,
        "steps": steps,
        "asymmetries": _asymmetries(context, spec),
        "gradients": _gradients(context, students, *list(train_tokens.items())[-1]),
        "depths": _depths(context, spec),
        "slot": f"{of_which}{first.module} ({spec}), {_SLOT_TOKENS:,} tokens, random weights in float32",
        "verdicts": found,
        "attacks": {name: TRAINING_ATTACKS[name].about for name in attacks},
    }


def _expect(context: AuditContext, train_tokens: dict[str, int]) -> None:
    """Says what an interrupted audit left, and what there is to do; work as in `AuditContext.expect_runs`."""
    resume, heldout, layers = context.resume, context.neutral.heldout.numel(), len(context.slots)
    chains = [c for c in context.chains.values() if resume is None or not resume.has(c.name)]
    todo = [mlp for mlp in context.mlps if mlp.module in {c.mlp.module for c in chains}]
    if resume is not None and resume.count:
        say(
            context.progress,
            f"{resume.folder} keeps {resume.count} finished parts of an interrupted audit, the students of "
            f"{len(context.chains) - len(chains)} of {len(context.chains)} chains among them: they are not done again",
        )
    fits = len(chains) * len(INITS)
    work = 3.0 * sum(chain.part for chain in chains) * len(INITS) * sum(train_tokens.values())
    sequential = context.across == "sequential"
    passes = SequentialCalibrator.rounds(context.mlps, todo) if sequential else 1
    expect(
        context.progress,
        [
            Phase("measuring both models", 2.0 * layers * heldout),
            Phase("activations of the locked", float(layers * (context.neutral.train.numel() + heldout))),
            Phase("activations of the original", float(passes * heldout), passes),
            Phase("redistilling", work, fits * len(train_tokens)),
            Phase("timing steps", 100.0 * layers * context.task.train.shape[1]),
            # forward and backward: of the original's MLPs, chains and students; of both models
            Phase("gradients of the chains", 4.0 * layers * min(GRADIENT_TOKENS, heldout)),
            Phase("gradients of both models", 6.0 * layers * min(GRADIENT_TOKENS, heldout)),
        ],
    )
    if predicts_next(context.original):
        models = (ORIGINAL, LOCKED, *train_tokens)
        context.runs_at_most = sum(len(_tried(context, of)) for of in models) * context.config.plan.runs
        context.expect_runs()


def _redistillations(context: AuditContext) -> dict[str, int]:
    """Training tokens of a student, by the name of the variant that it gives."""
    base = max((count or 0 for count in context.conversion.values()), default=0)
    if not base:
        base = EFFORTS["standard"].train_tokens
        context.notes.append(
            f"the checkpoint does not say what its conversion cost: shares are of {base:,} training tokens a module"
        )
    before = [context.resume is not None and context.resume.has(name) for name in context.chains]
    if any(before) and not all(before):
        context.notes.append(
            "the audit was interrupted while it made students: their seconds are of more than one session, and "
            "compare as far as the machine was as busy"
        )
    return {f"redistilled, {share:g}": max(1, round(share * base)) for share in context.config.chosen_shares}


def _variants(
    context: AuditContext, train_tokens: dict[str, int], students: list[Students]
) -> Iterator[ModelVariant]:
    """Each model to fine-tune, with all of its MLPs' places, locked or not: an attacker trains every layer."""
    specs = [chain_spec(net.spec) for _, net in every_chain(context.locked)]
    # Gated chains, of checkpoints of 0.1, are trained by their definition alone.
    deep = any(spec.depth > 1 for spec in specs) and not any(spec.gated for spec in specs)
    names = [name for mlp in context.mlps for name in (mlp.module, *mlp.identity)]
    locked = [name for name in context.slots if name in names]
    yield ModelVariant(ORIGINAL, context.original, context.slots, locked)
    yield ModelVariant(LOCKED, context.locked, context.slots, locked, deep)
    for name, count in train_tokens.items():
        places = _students_in(context, students, count)
        yield ModelVariant(name, with_chains(context.locked, places, []), context.slots, locked)


def _tried(context: AuditContext, variant: str) -> list[str]:
    """The attacks on a model, by name."""
    chosen, whole = context.config.chosen_attacks, variant in (ORIGINAL, LOCKED)
    return [name for name in chosen if whole or not TRAINING_ATTACKS[name].spares_chains]


def _students_in(context: AuditContext, students: list[Students], train_tokens: int) -> dict[str, nn.Module]:
    """What stands in modules' places where the best students of so many training tokens do."""
    nets = {context.chains[figures.module]: made[train_tokens] for figures, made in students}
    return in_places(context.locked, nets)


def _step_costs(context: AuditContext, variants: Callable[[], Iterator[ModelVariant]]) -> list[StepCost]:
    def part(name: str, make: Callable[[], Iterable[StepCost]]) -> list[StepCost]:
        return [StepCost(**row) for row in context.part(name, lambda: [asdict(row) for row in make()])]

    shape, rows = context.step_shape, []
    for variant in variants():
        progress = context.count(f"counting a step of the {variant.name} model")
        counting = partial(
            count_steps, variant, _tried(context, variant.name), shape, progress, context.notes.append
        )
        rows += part(f"steps {variant.name}", counting)
    timing = partial(time_steps, variants, rows, shape, context.count("timing steps"))
    return part("seconds", timing)  # one part: all in one session


def _asymmetries(context: AuditContext, spec: DLRSpec) -> list[Asymmetry]:
    """The asymmetry of one slot: the first locked module's, against a SwiGLU MLP of the original's width."""
    mlp = context.mlps[0]
    if not mlp.gated:
        context.notes.append(
            "no asymmetry: it is of a chain against a gated MLP, and the original's are not gated"
        )
        return []
    if spec.gated:
        context.notes.append("no asymmetry: gated steps, as of 0.1, have no fast form to compare")
        return []
    timed = BUDGETS[context.config.budget].timed
    if not timed:
        context.notes.append(
            "the asymmetry is counted, not timed, and has no compiled mode: --budget full times it"
        )

    def count() -> list[dict[str, Any]]:
        with nullcontext() if timed else FakeTensorMode():
            ours, theirs = slot_variants(
                spec, mlp.intermediate_size, tokens=_SLOT_TOKENS, dtype=torch.float32, device=context.device
            )
            return [asdict(a) for a in asymmetries(ours, theirs, repeats=3 if timed else 0)]

    context.progress("the asymmetry of a slot", 0, 1)
    found = [Asymmetry(**values) for values in context.part("asymmetry", count)]
    context.progress("the asymmetry of a slot", 1, 1)
    return found


def _gradients(
    context: AuditContext, students: list[Students], name: str, train_tokens: int
) -> list[GradientError]:
    """name, train_tokens: of the students that are measured beside the chains."""

    def part(name: str, make: Callable[[], Iterable[GradientError]]) -> list[GradientError]:
        return [GradientError(**row) for row in context.part(name, lambda: list(map(asdict, make())))]

    places = _students_in(context, students, train_tokens)
    found = part("gradients of chains", partial(module_gradients, context, places, name))
    if predicts_next(context.original):
        found += part("gradients of weights", partial(model_gradients, context))
    return found


def _depths(context: AuditContext, spec: DLRSpec) -> list[DepthCost]:
    """What plain autograd takes in the slot of the asymmetry, by depth; none where there is no asymmetry."""
    mlp = context.mlps[0]
    if not mlp.gated or spec.gated:
        return []

    def count() -> list[dict[str, Any]]:
        return [asdict(row) for row in depth_costs(spec, mlp.intermediate_size, tokens=_SLOT_TOKENS)]

    return [DepthCost(**values) for values in context.part("depths", count)]


def _locked_mlps(locked: PreTrainedModel, every: list[MLP]) -> list[MLP]:
    """Those of the original's MLPs whose places chains have taken, in model order."""
    specs = {name: chains.spec for name, chains in every_chain(locked)}
    found = [mlp for mlp in every if mlp.module in specs]
    missing = sorted(specs.keys() - {mlp.module for mlp in found})
    missing += [mlp.module for mlp in found if not _fits(mlp, specs[mlp.module])]
    if missing:
        raise DLRError(f"this is not the model that was locked: its {missing[0]} is no MLP of the same size")
    return found


def _fits(mlp: MLP, spec: DLRSpec | ExpertsSpec) -> bool:
    """Whether chains of this shape can have taken an MLP's place."""
    experts = mlp.experts if isinstance(mlp, Mixture) else None
    wanted = spec.experts if isinstance(spec, ExpertsSpec) else None
    return experts == wanted and mlp.hidden_size == chain_spec(spec).hidden_size


def _conversion_tokens(mlps: list[MLP], conversion: dict[str, Any]) -> dict[str, int | None]:
    """Training tokens of each module's conversion; a mixture's are those of all experts, of which a token has some."""
    spent = {m["module"]: m.get("train_tokens", m.get("tokens")) for m in conversion.get("modules", [])}
    for mlp in mlps:
        if isinstance(mlp, Mixture) and spent.get(mlp.module):
            spent[mlp.module] = max(1, spent[mlp.module] // mlp.chosen)
    return spent


def _is_module(model: PreTrainedModel, name: str) -> bool:
    """An MLP's activation may be a plain function."""
    parent, _, child = name.rpartition(".")
    return isinstance(getattr(model.get_submodule(parent), child), nn.Module)


def _texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, config: AuditConfig
) -> tuple[Text, Text]:
    """The neutral text, and the task's."""
    room = positions(model.config)
    assert config.tokens and config.heldout and config.sequence
    neutral = read_split(
        config.data,
        tokenizer,
        tokens=config.tokens,
        heldout_tokens=config.heldout,
        sequence_length=sequence_length(model),
    )
    task = read_split(
        config.task,
        tokenizer,
        tokens=config.plan.tokens,
        heldout_tokens=BUDGETS[config.budget].task_heldout,
        sequence_length=min(config.sequence, room or config.sequence),
        seed=config.seed,
    )
    return neutral, task


def _check(target: Path, *, overwrite: bool) -> None:
    """Looks before long work whether the result can be written; raises DLRError where it cannot."""
    if not target.name or (target.exists() and not target.is_dir()):
        raise DLRError(f"{target} is not a directory that an audit could be written to")
    if (target / _JSON).exists() and not overwrite:
        raise DLRError(f"{target} holds an audit; choose another output or pass --overwrite")
    writable_folder(target)


def _digest(locked: Path, facts: dict[str, Any]) -> str:
    """What identifies a checkpoint's content: the manifest's hashes, or those of its weights."""
    files = facts.get("files") or {
        path.name: hash_files([path]) for path in sorted(locked.glob("*.safetensors"))
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
