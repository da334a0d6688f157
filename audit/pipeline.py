"""An audit from end to end: both models, every attack, the verdicts, and the files that say so."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..common.errors import DLRError
from ..common.files import full_disk_is_an_error, hash_files, write_whole
from ..common.machine import device_name, machine
from ..common.progress import Progress
from ..common.resume import ResumeStore, run_lock
from ..common.version import __version__
from ..convert.config import EFFORTS
from ..convert.data import digest, sequence_length
from ..convert.end_to_end import with_chains
from ..convert.evaluate import compare, predicts_next
from ..convert.mlp_discovery import find_mlps
from ..convert.mlp_matching import MLP
from ..convert.source import load_tokenizer, open_source, public_name
from ..runtime import DLRSpec, inspect, load, locked_modules
from ..runtime.generation import positions
from .asymmetry import Asymmetry, asymmetries
from .config import BUDGETS, AuditConfig
from .costs import Variant, count_steps, time_steps
from .learning import FIRST_RATES, fine_tune, sweep
from .redistil import Students, redistil, redistil_row
from .report import AuditReport, Run, StepCost, Structural, structural_from
from .sections import page
from .strategies.model import NothingToTrain
from .strategies.slot import variants as slot_variants
from .structural import structural_rows
from .texts import Text, read_split
from .verdict import ORIGINAL, verdicts

THREAT = (
    "The attacker has the locked weights, this program and text of their own, but not the original's weights, and "
    "wants a model that is as good at a new task as the fine-tuned original would be."
)
_JSON, _PAGE = "audit.json", "audit.html"
_NEUTRAL_SEQUENCES = 2  # of held-out neutral text, for the collapse check
_SLOT_TOKENS = 1024


def audit_model(
    locked: str | Path,
    original: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> AuditReport:
    """Runs the attacks on a locked checkpoint and its original, and writes audit.json and audit.html to folder `out`.

    options: the fields of `AuditConfig`. progress is called with (what, done, total). Finished parts are kept in
    `<out>.partial`: the same call goes on from there after a failure or Ctrl-C. The same seed gives the same figures on
    the same machine, but for seconds. Raises DLRError on everything that the user can correct.
    """
    chosen = AuditConfig.of(options).resolved()
    target = Path(out).expanduser().absolute()
    _check(target, overwrite=overwrite)
    with run_lock(target):
        _check(target, overwrite=overwrite)  # again, now that nobody else writes
        return _audited(locked, original, target, chosen, progress or (lambda what, done, total: None))


def _audited(
    locked: str | Path, original: str | Path, target: Path, chosen: AuditConfig, report_progress: Progress
) -> AuditReport:
    began = time.monotonic()
    device = torch.device(str(chosen.device))
    facts = inspect(locked)
    report_progress("reading the models", 0, 2)
    ours = load(locked, dtype=torch.float32, device=device)
    report_progress("reading the models", 1, 2)
    source = open_source(original, dtype=torch.float32, device=device)
    report_progress("reading the models", 2, 2)
    every = find_mlps(source.model, facts.get("conversion", {}).get("options", {}).get("mlps"))
    mlps = _locked_mlps(ours, every)
    slots = [name for mlp in every for name in (mlp.module, *mlp.identity) if _is_module(source.model, name)]
    tokenizer = load_tokenizer(Path(locked)) or source.tokenizer
    neutral, task = _texts(ours, tokenizer, chosen)
    about = {k: v for k, v in chosen.to_dict().items() if k not in ("device", "max_memory")}
    about |= {
        "locked": _digest(Path(locked), facts),
        "original": source.fingerprint,
        "text": [digest(part) for text in (neutral, task) for part in (text.train, text.heldout)],
        # seconds of two machines, or of two thread counts, do not compare
        "machine": [device_name(device), torch.get_num_threads()],
        "program": __version__,
    }
    kept = ResumeStore(target, about)
    audit = _Audit(ours, source.model, mlps, slots, neutral, task, chosen, kept, report_progress)
    if facts.get("conversion", {}).get("fingerprint", source.fingerprint) != source.fingerprint:
        audit.notes.append("the original is not the one that was locked: its files have other hashes")
    with TemporaryDirectory() as scratch:
        found = audit.run(facts, Path(scratch))
    report = AuditReport(
        locked=Path(locked).resolve().name,
        original=public_name(str(original)),
        options=chosen.to_dict() | {"task": task.source, "data": neutral.source},
        machine=machine(device),
        threat=THREAT,
        seconds=time.monotonic() - began,
        **found,
    )
    with full_disk_is_an_error(target):
        text = json.dumps(report.to_dict(), indent=1, allow_nan=False)
        write_whole(target / _JSON, lambda path: path.write_text(text + "\n", encoding="utf-8"))
        write_whole(target / _PAGE, lambda path: path.write_text(page(report), encoding="utf-8"))
    kept.remove()
    return report


class _Audit:
    """One audit's models, texts and choices. mlps: the locked ones; slots: modules that are, or make up, any MLP."""

    def __init__(
        self,
        locked: PreTrainedModel,
        original: PreTrainedModel,
        mlps: list[MLP],
        slots: list[str],
        neutral: Text,
        task: Text,
        options: AuditConfig,
        kept: ResumeStore,
        progress: Progress,
    ) -> None:
        self._locked, self._original, self._mlps = locked, original, mlps
        self._neutral, self._task, self._options = neutral, task, options
        self._kept, self._progress = kept, progress
        self._slots = slots
        self._device = torch.device(str(options.device))
        self.notes: list[str] = []
        self._run, self._runs = 0, 0  # fine-tunings begun, and how many there are at most

    def run(self, facts: dict[str, Any], scratch: Path) -> dict[str, Any]:
        """The fields of `AuditReport` that are found out."""
        heldout = self._neutral.heldout
        measuring = partial(self._progress, "measuring both models")
        fidelity = compare(self._locked, self._original, heldout, measuring)
        rows = list(
            structural_rows(
                self._locked, self._original, self._mlps, heldout, self._progress, self._structural
            )
        )
        train_tokens, students = self._copies(facts, scratch)
        undone = {name: self._undone(name, count, students) for name, count in train_tokens.items()}
        runs: list[Run] = []
        steps: list[StepCost] = []
        if predicts_next(self._original):
            variants = partial(self._arms, train_tokens, students)
            self._runs = (2 + len(train_tokens)) * len(self._options.chosen_attacks) * self._options.plan.runs
            for variant in variants():
                for attack in self._options.chosen_attacks:
                    runs += self._learn(variant, attack)
            steps = self._steps(variants)
        else:
            self.notes.append("nothing was fine-tuned: the model has no language-model head to give a loss")
        redistillation = {
            name: {"flops": row.flops or 0, "seconds": row.seconds or 0} for name, row in undone.items()
        }
        found = verdicts(runs, steps, redistillation)
        if runs and not found:
            self.notes.append("no verdict: the original gained no more on the task than its seeds differ by")
        return {
            "fidelity": fidelity,
            "structural": [*rows, *undone.values()],
            "modules": [figures for figures, _ in students],
            "runs": runs,
            "steps": steps,
            "asymmetries": self._asymmetries(),
            "slot": f"{self._mlps[0].module} ({self._slot_spec()}), {_SLOT_TOKENS:,} tokens, random weights in float32",
            "verdicts": found,
            "notes": self.notes,
        }

    def _copies(self, facts: dict[str, Any], scratch: Path) -> tuple[dict[str, int], list[Students]]:
        """Visits by the name of the variant that they give, and every module's students."""
        made = {
            m["module"]: m.get("train_tokens", m.get("tokens"))
            for m in facts.get("conversion", {}).get("modules", [])
        }
        base = max(made.values(), default=0)
        if not base:
            base = EFFORTS["standard"].train_tokens
            self.notes.append(
                f"the checkpoint does not say what its conversion cost: shares are of {base:,} training tokens a module"
            )
        train_tokens = {
            f"re-distilled, {share:g}": max(1, round(share * base)) for share in self._options.chosen_shares
        }
        before = [self._kept.has(mlp.module) for mlp in self._mlps]
        if any(before) and not all(before):
            self.notes.append(
                "the audit was interrupted while it made students: their seconds are of more than one session, and "
                "compare as far as the machine was as busy"
            )
        students = redistil(
            self._locked,
            self._original,
            self._mlps,
            self._neutral.train,
            self._neutral.heldout,
            train_tokens=sorted(set(train_tokens.values())),
            conversion={mlp.module: made.get(mlp.module) for mlp in self._mlps},
            device=self._device,
            max_memory=int(self._options.max_memory or 0),
            scratch=scratch,
            seed=self._options.seed,
            kept=self._kept,
            progress=self._progress,
            note=self.notes.append,
        )
        return train_tokens, list(students)

    def _undone(self, name: str, train_tokens: int, students: list[Students]) -> Structural:
        row = partial(
            redistil_row,
            self._locked,
            self._original,
            students,
            self._neutral.heldout,
            name=name,
            train_tokens=train_tokens,
            tokens=self._neutral.train.numel(),
            progress=self._progress,
        )
        return self._structural(name, row)

    def _arms(self, train_tokens: dict[str, int], students: list[Students]) -> Iterator[Variant]:
        """Each model to fine-tune, with all of its MLPs' places, locked or not: an attacker trains every layer."""
        deep = any(net.spec.depth > 1 for _, net in locked_modules(self._locked))
        yield Variant(ORIGINAL, self._original, self._slots)
        yield Variant("locked", self._locked, self._slots, deep)
        for name, count in train_tokens.items():
            nets = {figures.module: made[count] for figures, made in students}
            yield Variant(name, with_chains(self._locked, nets, []), self._slots)

    def _learn(self, variant: Variant, attack: str) -> list[Run]:
        title = f"fine-tuning the {variant.name} model, {attack}"
        begun = self._run

        def make(rate: float, seed: int) -> Run:
            self._run += 1
            what = f"run {self._run} of at most {self._runs}: {title}, rate {rate:.1e}, seed {seed}"

            def run() -> dict[str, Any]:
                return asdict(
                    fine_tune(
                        variant.model,
                        variant.mlps,
                        self._task,
                        self._neutral.heldout[:_NEUTRAL_SEQUENCES],
                        self._options.plan,
                        variant=variant.name,
                        attack=attack,
                        rate=rate,
                        seed=seed,
                        progress=partial(self._progress, what),
                    )
                )

            values = self._part(f"run {variant.name} {attack} {rate:.9g} {seed}", run)
            return Run(**values | {"neutral": tuple(values["neutral"])})

        try:
            runs = sweep(make, FIRST_RATES[attack], self._options.plan, self._options.seed)
        except NothingToTrain as error:
            self.notes.append(f"{title}: not done, {error}")
            return []
        finally:
            self._runs -= self._options.plan.runs - (self._run - begun)
        rates = sorted({run.rate for run in runs})
        if len(rates) > 1 and runs[0].rate in (rates[0], rates[-1]):
            self.notes.append(
                f"{title}: the best rate, {runs[0].rate:.1e}, is the last one tried on its side"
            )
        return runs

    def _steps(self, variants: Callable[[], Iterator[Variant]]) -> list[StepCost]:
        n = self._task.train.shape[1]
        shape = self._options.plan.sequences(n), n
        rows: list[StepCost] = []
        for variant in variants():
            progress = partial(self._progress, f"counting a step of the {variant.name} model")
            counting = partial(count_steps, variant, self._options.chosen_attacks, shape, progress)
            rows += self._step_rows(f"steps {variant.name}", counting)
        timing = partial(time_steps, variants, rows, shape, partial(self._progress, "timing steps"))
        return self._step_rows("seconds", timing)  # one part: all in one session

    def _step_rows(self, name: str, make: Callable[[], Iterable[StepCost]]) -> list[StepCost]:
        return [StepCost(**row) for row in self._part(name, lambda: [asdict(row) for row in make()])]

    def _asymmetries(self) -> list[Asymmetry]:
        """Of one slot: the first locked module's, against a SwiGLU MLP of the original's width."""
        if not self._mlps[0].gated:
            self.notes.append(
                "no asymmetry: it is of a chain against a gated MLP, and the original's are not gated"
            )
            return []
        timed = BUDGETS[self._options.budget].timed
        if not timed:
            self.notes.append(
                "the asymmetry is counted, not timed, and has no compiled mode: --budget full times it"
            )

        def count() -> list[dict[str, Any]]:
            with nullcontext() if timed else FakeTensorMode():
                ours, theirs = slot_variants(
                    self._slot_spec(),
                    self._mlps[0].intermediate_size,
                    tokens=_SLOT_TOKENS,
                    dtype=torch.float32,
                    device=self._device,
                )
                return [asdict(a) for a in asymmetries(ours, theirs, repeats=3 if timed else 0)]

        self._progress("the asymmetry of a slot", 0, 1)
        found = [Asymmetry(**values) for values in self._part("asymmetry", count)]
        self._progress("the asymmetry of a slot", 1, 1)
        return found

    def _slot_spec(self) -> DLRSpec:
        return dict(locked_modules(self._locked))[self._mlps[0].module].spec

    def _structural(self, name: str, make: Callable[[], Structural]) -> Structural:
        return structural_from(self._part(f"structural {name}", lambda: asdict(make())))

    def _part(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, in plain values, or gave before an interruption."""
        found = self._kept.get(name)
        if found is not None:
            return found[1]["value"]
        value = make()
        self._kept.put(name, {}, {"value": value})
        return json.loads(json.dumps(value))  # as it will be read: with lists for tuples


def _locked_mlps(locked: PreTrainedModel, every: list[MLP]) -> list[MLP]:
    """Those of the original's MLPs whose places chains have taken, in model order."""
    chains = dict(locked_modules(locked))
    found = [mlp for mlp in every if mlp.module in chains]
    missing = sorted(chains.keys() - {mlp.module for mlp in found})
    missing += [mlp.module for mlp in found if mlp.hidden_size != chains[mlp.module].spec.hidden_size]
    if missing:
        raise DLRError(f"this is not the model that was locked: its {missing[0]} is no MLP of the same size")
    return found


def _is_module(model: PreTrainedModel, name: str) -> bool:
    """An MLP's activation may be a plain function."""
    parent, _, child = name.rpartition(".")
    return isinstance(getattr(model.get_submodule(parent), child), nn.Module)


def _texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, options: AuditConfig
) -> tuple[Text, Text]:
    """(neutral, task)."""
    room = positions(model)
    assert options.tokens and options.heldout and options.sequence
    neutral = read_split(
        options.data,
        tokenizer,
        tokens=options.tokens,
        heldout_tokens=options.heldout,
        sequence_length=sequence_length(model),
    )
    task = read_split(
        options.task,
        tokenizer,
        tokens=options.plan.tokens,
        heldout_tokens=BUDGETS[options.budget].task_heldout,
        sequence_length=min(options.sequence, room or options.sequence),
        seed=options.seed,
    )
    return neutral, task


def _check(target: Path, *, overwrite: bool) -> None:
    """Raises DLRError, before any long work, where the result could not be written."""
    if not target.name or (target.exists() and not target.is_dir()):
        raise DLRError(f"{target} is not a directory that an audit could be written to")
    if (target / _JSON).exists() and not overwrite:
        raise DLRError(f"{target} holds an audit; choose another output or pass --overwrite")
    nearest = next(p for p in (target, *target.parents) if p.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise DLRError(f"cannot write to {nearest}")


def _digest(locked: Path, facts: dict[str, Any]) -> str:
    """Of the checkpoint's content: the manifest's hashes, or those of its weights."""
    files = facts.get("files") or {
        path.name: hash_files([path]) for path in sorted(locked.glob("*.safetensors"))
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
