"""Redistillation: every chain of a locked model back into an MLP of its size or two wide steps, on the attacker's
text.

One module at a time, from activations of the locked model alone: the attacker has no original. The original serves
to say how good the students are, as stand-ins for what each chain was fitted to.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from ...common.errors import DLRError
from ...common.resume import ResumeStore
from ...common.splits import random_rows
from ...convert.activations import Activations, SequentialCalibrator, capture
from ...convert.end_to_end import with_chains
from ...convert.evaluate import distance_of, measure
from ...convert.layer_runner import Unrepeatable
from ...convert.mlp_matching import MLP
from ...convert.muon import Muon
from ...convert.redistill import (
    BATCH,
    FIT_TOKENS,
    INITS,
    fit_student,
    half_of,
    linear_reads,
    merged,
    regression_flops,
)
from ...reporting.lock_verdict import UNDONE_RATIO, error_ratio
from ...runtime import DLRNet, DLRSpec
from ...triton_kernels import backend
from ...triton_kernels.meter import count
from ..context import AuditContext
from ..reference import Reference
from ..report import Merge, ModuleStudents, Structural, Student
from .structural import evaluated

# A module's students, and the best one by training tokens: by none, the shortest chain that regression alone makes.
Students = tuple[ModuleStudents, dict[int, DLRNet]]

_SEQUENCES = 2  # of held-out text, by which the best student is chosen


def redistilled_modules(
    context: AuditContext, train_tokens: Sequence[int], inits: Sequence[str] = INITS
) -> Iterator[Students]:
    """Distils every chain back into MLPs. A module's draws depend on the seed and its layer alone.

    A student that diverges is left out, and the context gets a note. Finished modules are taken from its resume store.

    Args:
        context: The models, the attacker's text (the neutral one) and where to work.
        train_tokens: Training tokens of a student, each from each initialisation.
        inits: The initialisations, see `convert.redistill`.

    Yields:
        For each module in the order of the model, the figures of its students and, by training tokens, the best one,
        float32 on the CPU: that which alone in its chain's place leaves the model nearest to the locked one. An
        attacker can measure that, and wants nothing else: a student may have the lowest error and miss the one token in
        512 that carries the massive activations (layer 11 of SmolLM2, from a random start).

    Raises:
        DLRError: Where all students of a module with the same training tokens diverge, and as `capture` does.
    """
    mlps, train, heldout = context.mlps, context.neutral.train, context.neutral.heldout
    before = {mlp.module: _restored(context.resume, mlp.module) for mlp in mlps}
    todo = [mlp for mlp in mlps if before[mlp.module] is None]
    tokens = torch.cat([train, heldout])
    rows = len(tokens) + len(heldout)
    memory = int(context.config.max_memory or 0)
    own = capture(
        context.locked,
        todo,
        tokens,
        max_memory=memory * len(tokens) // rows,
        scratch=context.scratch,
        progress=context.count("activations of the locked model"),
    )
    wanted = chain_targets(context, todo, max_memory=memory * len(heldout) // rows)
    itself = Reference(context.locked, heldout[:_SEQUENCES])
    attempts = [(count, init) for count in sorted(train_tokens) for init in inits]
    for number, mlp in enumerate(mlps, 1):
        done = before[mlp.module]
        if done is None:
            began = time.monotonic()
            pairs = next(own)[1]
            captured = time.monotonic() - began
            notes: list[str] = []
            title = f"redistilling {mlp.module} ({number} of {len(mlps)})"
            figures, nets = _module_students(
                context, itself, mlp, pairs, next(wanted), attempts, captured, title, notes.append
            )
            done = figures, nets, notes
            if context.resume is not None:
                _keep(context.resume, mlp.module, *done)
        context.notes += done[2]
        yield done[:2]


def chain_targets(context: AuditContext, todo: Sequence[MLP], *, max_memory: int) -> Iterator[Activations]:
    """What each chain is there for, on the held-out neutral text: the x that it gets, and the y that it should give.

    In a model converted in sequence a chain corrects what was locked before it, so that y is not the original MLP's
    output: where layer 11 of SmolLM2 errs at the first token, layer 12's chain makes up for it, and was 164,000 times
    |mlp|^2 from its MLP there. By that, a student of 27 times the chain's error passed for as good as the chain.

    Args:
        context: The models and the text.
        todo: Whose targets are wanted, in model order.
        max_memory: Bytes for activations.

    Yields:
        x and y for each of `todo`: as `SequentialCalibrator.pairs` gives them, or, where the conversion was independent
        or the model does not allow it, as the original's own MLP does.

    Raises:
        DLRError: As `capture` does.
    """
    heldout = context.neutral.heldout
    room: dict[str, Any] = {
        "max_memory": max_memory,
        "scratch": context.scratch,
        "progress": context.count("activations of the original model"),
    }
    if context.across == "sequential":
        try:
            calibrator = SequentialCalibrator(context.original, context.mlps, heldout, **room)
        except Unrepeatable:
            pass
        else:
            last = max((context.mlps.index(mlp) for mlp in todo), default=-1)
            for mlp in context.mlps[: last + 1]:
                if mlp in todo:
                    yield calibrator.pairs(mlp)
                calibrator.put(mlp, context.locked.get_submodule(mlp.module))
            return
    for _, pairs in capture(context.original, todo, heldout, **room):
        yield pairs


def _module_students(
    context: AuditContext,
    itself: Reference,
    mlp: MLP,
    own: Activations,
    wanted: Activations,
    attempts: Sequence[tuple[int, str]],
    captured: float,
    title: str,
    note: Callable[[str], object],
) -> Students:
    """The students of one module.

    itself: the locked model. own: of the chain in it, the attacker's text first; wanted: what the chain was fitted to,
    held out, see `chain_targets`. attempts: training tokens and initialisation of each student. captured: seconds that
    getting `own` took.
    """
    chain, device, tokens = (
        context.locked.get_submodule(mlp.module),
        context.device,
        context.neutral.train.numel(),
    )
    conversion = context.conversion.get(mlp.module)
    held = own.rows(torch.arange(tokens, len(own)))
    students: list[Student] = []
    best: dict[int, tuple[float, DLRNet]] = {}
    for train_tokens, init in attempts:
        what = f"{init} init, {train_tokens:,} training tokens"
        began = time.monotonic()
        try:
            net = fit_student(
                chain,
                own,
                tokens,
                train_tokens=train_tokens,
                init=init,
                seed=context.config.seed + mlp.layer,
                name=mlp.module,
                device=device,
                progress=context.count(f"{title}, {what}"),
                note=note,
            )
            seconds = captured + time.monotonic() - began
            distance = _distance_left(context.locked, itself, mlp.module, net)
        except DLRError as reason:
            note(f"a student of {mlp.module} is missing ({what}): {reason}")
            continue
        error, student_error = (
            measure(net, *pairs, device).rel_error for pairs in ((wanted.x, wanted.y), held)
        )
        share = train_tokens / conversion if conversion else None
        students.append(Student(init, train_tokens, share, error, student_error, seconds, distance))
        if train_tokens not in best or distance < best[train_tokens][0]:
            best[train_tokens] = distance, net
    if best.keys() != {train_tokens for train_tokens, _ in attempts}:
        raise DLRError(f"no student of {mlp.module} could be distilled: try another --seed")
    chain_error = measure(chain, wanted.x, wanted.y, device).rel_error
    gap = measure(chain, *held, device).flatten_gap
    x = own.rows(random_rows(tokens, FIT_TOKENS, context.config.seed + mlp.layer))[0].to(
        device, torch.float32
    )
    merges, shortest = merge_steps(
        chain, x, lambda net: measure(net, wanted.x, wanted.y, device).rel_error, chain_error
    )
    nets = {0: shortest} | {train_tokens: net for train_tokens, (_, net) in best.items()}
    return ModuleStudents(mlp.module, str(chain.spec), chain_error, gap, students, merges), nets


def merge_steps(
    chain: DLRNet, x: Tensor, error: Callable[[DLRNet], float], chain_error: float
) -> tuple[list[Merge], DLRNet]:
    """Merges a chain's steps into as few as do what it does, by regression alone.

    Each of 1, 2, 3, 4, 6, 8, 12, ... wide steps reads the state before the first step that it replaces, in the
    directions that `linear_reads` gives. On layer 12 of SmolLM2, four such steps have 1.036 of the error of the
    chain of twelve, one has 1.22, before any training.

    Args:
        chain: The chain; it stays as it is.
        x: [N, d] float32, tokens to fit the linear maps on.
        error: The relative error of a chain of the same hidden size.
        chain_error: The chain's own.

    Returns:
        What was tried, in ascending order of the steps, and the chain of the fewest that count as good as the chain,
        float32 on the CPU: the chain itself where no shorter one does.
    """
    depth, found = chain.spec.depth, []
    for group in _groups(depth):
        net = merged(chain, group, linear_reads(chain, x, group))
        found.append(Merge(net.spec.depth, error(net)))
        if error_ratio(found[-1].error, chain_error) <= UNDONE_RATIO:
            return found, net.cpu()
    return [*found, Merge(depth, chain_error)], copy.deepcopy(chain).float().cpu()


def _groups(depth: int) -> list[int]:
    """Steps to merge into one, more than one, that leave 1, 2, 3, 4, 6, 8, 12, ... of a chain's."""
    shorter = sorted(m * 2**n for n in range(depth.bit_length()) for m in (1, 3) if m * 2**n < depth)
    return [group for group in dict.fromkeys(-(-depth // steps) for steps in shorter) if group > 1]


def _distance_left(locked: PreTrainedModel, itself: Reference, module: str, net: DLRNet) -> float:
    """How far the locked model is from itself with a student in one chain's place, on a little held-out neutral text.

    Raises:
        DLRError: As `compare` does.
    """
    with backend("naive"):  # see `structural.evaluated`
        return distance_of(itself.compare(with_chains(locked, {module: net}, [])))


def redistillation_flops(
    net: DLRNet, chain: DLRSpec, train_tokens: int, init: str, *, model_params: int, tokens: int
) -> int:
    """FLOPs of making one student of one chain.

    They are those of the fit, of its optimizer's steps, of the forward pass that gives x and y, and of the least
    squares of the initialisation where that is 'linear'.

    Args:
        net: The student.
        chain: The chain.
        train_tokens: Training tokens of the fit.
        init: What the student started from.
        model_params: Of the model's body, without embeddings, which are looked up, over its locked modules.
        tokens: Of the attacker's text; fewer are run where the training tokens are fewer.
    """
    used = min(train_tokens, tokens)
    fit = 6 * net.spec.params * train_tokens
    steps = -(-train_tokens // min(BATCH, train_tokens)) * step_flops(net.spec)
    forward = 2 * model_params * used
    return fit + steps + forward + (regression_flops(chain, used, half_of(chain)) if init == "linear" else 0)


@lru_cache
def step_flops(spec: DLRSpec) -> int:
    """FLOPs of one step of Muon on a chain, counted."""
    with FakeTensorMode():
        net = DLRNet(spec, dtype=torch.float32)
        weights = [getattr(net, name).requires_grad_() for name in net.weight_names(spec)]
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        return count(Muon([{"params": weights, "lr": 0.0}]).step).flops


def redistillation_row(
    context: AuditContext, modules: Sequence[Students], name: str, train_tokens: int
) -> Structural:
    """The best students in the chains' places, against the original on the neutral held-out text.

    Args:
        context: The models and the text.
        modules: What `redistilled_modules` yielded.
        name: The row's.
        train_tokens: Training tokens of the students that are taken.

    Returns:
        The row; its FLOPs and seconds are those of the best students alone.
    """
    nets = {figures.module: made[train_tokens] for figures, made in modules}
    best = {
        figures.module: min(
            (c for c in figures.students if c.train_tokens == train_tokens), key=lambda c: c.distance
        )
        for figures, _ in modules
    }
    body = context.locked.base_model.num_parameters(exclude_embeddings=True)
    flops = sum(
        redistillation_flops(
            net,
            context.locked.get_submodule(module).spec,
            train_tokens,
            best[module].init,
            model_params=body // len(nets),
            tokens=context.neutral.train.numel(),
        )
        for module, net in nets.items()
    )
    return Structural(
        name,
        "every chain is distilled back, on its own outputs, into an MLP of its size or two wide steps",
        evaluated(context, with_chains(context.locked, nets, []), name),
        "MLP" if all(net.spec.depth == 1 for net in nets.values()) else "two steps",
        train_tokens,
        flops,
        sum(student.seconds for student in best.values()),
    )


def merged_row(context: AuditContext, modules: Sequence[Students], name: str) -> Structural:
    """Every chain as the fewest wide steps that regression alone makes as good as it, against the original.

    Args:
        context: The models and the text.
        modules: What `redistilled_modules` yielded.
        name: The row's.

    Returns:
        The row; its FLOPs are those of the passes that give x and of every regression that was tried.
    """
    tokens = min(context.neutral.train.numel(), FIT_TOKENS)
    flops = 2 * context.locked.base_model.num_parameters(exclude_embeddings=True) * tokens
    for figures, _ in modules:
        chain = context.locked.get_submodule(figures.module).spec
        flops += sum(regression_flops(chain, tokens, -(-chain.depth // m.steps)) for m in figures.merges)
    nets = {figures.module: made[0] for figures, made in modules}
    return Structural(
        name,
        f"every chain is merged into as few wide steps as leave at most {UNDONE_RATIO} times its error, their reading "
        "directions found by linear regression; nothing is trained",
        evaluated(context, with_chains(context.locked, nets, []), name),
        "chain",
        flops=flops,
    )


def _keep(
    resume: ResumeStore, module: str, students: ModuleStudents, nets: dict[int, DLRNet], notes: list[str]
) -> None:
    tensors = {
        f"{train_tokens}.{name}": t
        for train_tokens, net in nets.items()
        for name, t in net.state_dict().items()
    }
    specs = {str(train_tokens): net.spec.to_dict() for train_tokens, net in nets.items()}
    resume.put(module, tensors, {"students": asdict(students), "specs": specs, "notes": notes})


def _restored(
    resume: ResumeStore | None, module: str
) -> tuple[ModuleStudents, dict[int, DLRNet], list[str]] | None:
    """A module that an interrupted audit finished, None where it did not."""
    found = resume.get(module) if resume is not None else None
    if found is None:
        return None
    tensors, figures = found
    try:
        values = figures["students"]
        students = ModuleStudents(
            **values
            | {
                "students": [Student(**student) for student in values["students"]],
                "merges": [Merge(**merge) for merge in values["merges"]],
            }
        )
        nets = {}
        for train_tokens, spec in figures["specs"].items():
            net = nets[int(train_tokens)] = DLRNet(DLRSpec.from_dict(spec), dtype=torch.float32)
            net.assign({name: tensors[f"{train_tokens}.{name}"] for name in net.state_dict()})
        return students, nets, figures["notes"]
    except (KeyError, TypeError, ValueError) as error:
        raise DLRError(f"what is kept of {module} is damaged: delete that folder") from error
