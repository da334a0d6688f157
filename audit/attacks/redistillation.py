"""Redistillation: every chain of a locked model back into an MLP of its size or two wide steps, on the attacker's
text.

One module at a time, from activations of the locked model alone: the attacker has no original. The original serves
to say how good the students are, as stand-ins for what each chain was fitted to.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...common.errors import DLRError
from ...common.resume import ResumeStore
from ...common.splits import random_rows
from ...convert.activations.calibrator import SequentialCalibrator
from ...convert.activations.capture import capture
from ...convert.activations.pairs import Activations
from ...convert.end_to_end import with_chains
from ...convert.evaluate import distance_of, measure
from ...convert.layer_runner import Unrepeatable
from ...convert.mlp_matching import MLP
from ...convert.redistill import (
    FIT_TOKENS,
    INITS,
    fit_student,
    linear_reads,
    merged,
)
from ...reporting.lock_verdict import UNDONE_RATIO, error_ratio
from ...runtime import DLRNet, DLRSpec
from ...triton_kernels import backend
from ..chains import Chain, by_chain, in_places
from ..context import AuditContext
from ..reference import Reference
from ..report import Merge, ModuleStudents, Student

# A chain's students, and the best one by training tokens of a module: by none, the shortest chain that regression alone
# makes.
Students = tuple[ModuleStudents, dict[int, DLRNet]]

_SEQUENCES = 2  # of held-out text, by which the best student is chosen


def redistilled_modules(
    context: AuditContext, train_tokens: Sequence[int], inits: Sequence[str] = INITS
) -> Iterator[Students]:
    """Distils every chain back into MLPs. A module's draws depend on the seed and its layer alone.

    A student that diverges is left out, and the context gets a note. Finished modules are taken from its resume store.

    Args:
        context: The models, the attacker's text (the neutral one) and where to work.
        train_tokens: Training tokens of a student, each from each initialisation; of an expert's chain, the part of
            them that its mixture's router gives it.
        inits: The initialisations, see `convert.redistill`.

    Yields:
        For each of `context.chains` the figures of its students and, by `train_tokens`, the best one, float32 on the
        CPU: that which alone in its chain's place leaves the model nearest to the locked one. An attacker can measure
        that, and wants nothing else: a student may have the lowest error and miss the one token in 512 that carries the
        massive activations (layer 11 of SmolLM2, from a random start).

    Raises:
        DLRError: Where all students of a module with the same training tokens diverge, and as `capture` does.
    """
    train, heldout = context.neutral.train, context.neutral.heldout
    chains = list(context.chains.values())
    before = {chain: _restored(context.resume, chain.name) for chain in chains}
    missing = Counter(chain.mlp.module for chain in chains if before[chain] is None)
    todo = [mlp for mlp in context.mlps if missing[mlp.module]]
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
    given: _Given | None = None
    for number, chain in enumerate(chains, 1):
        done = before[chain]
        if done is None:
            if given is None or given.mlp is not chain.mlp:
                began = time.monotonic()
                ours = by_chain(context.locked, chain.mlp, next(own)[1], train.numel())
                captured = (time.monotonic() - began) / missing[chain.mlp.module]
                given = _Given(chain.mlp, ours, next(wanted), captured)
            notes: list[str] = []
            title = f"redistilling {chain.name} ({number} of {len(chains)})"
            done = *_students(context, itself, chain, given, attempts, title, notes.append), notes
            if context.resume is not None:
                _keep(context.resume, chain.name, *done)
        context.notes += done[2]
        yield done[:2]


class _Given(NamedTuple):
    """What a module's chains get and what they should give, see `by_chain`.

    ours: in the locked model, the attacker's text first. wanted: what they were fitted to, held out. captured: seconds
    that getting `ours` took, a chain.
    """

    mlp: MLP
    ours: Callable[[Chain], tuple[Activations, int]]
    wanted: Callable[[Chain], tuple[Activations, int]]
    captured: float


def chain_targets(
    context: AuditContext, todo: Sequence[MLP], *, max_memory: int
) -> Iterator[Callable[[Chain], tuple[Activations, int]]]:
    """What each chain is there for, on the held-out neutral text: the x that it gets, and the y that it should give.

    In a model converted in sequence a chain corrects what was locked before it, so that y is not the original MLP's
    output: where layer 11 of SmolLM2 errs at the first token, layer 12's chain makes up for it, and was 164,000 times
    |mlp|^2 from its MLP there. By that, a student of 27 times the chain's error passed for as good as the chain.

    Args:
        context: The models and the text.
        todo: Whose targets are wanted, in model order.
        max_memory: Bytes for activations.

    Yields:
        Of each of `todo` what gives x and y of its chains, see `by_chain`: as `SequentialCalibrator.pairs` gives them,
        or, where the conversion was independent or the model does not allow it, as the original's own MLP does.

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
                    yield by_chain(context.original, mlp, calibrator.pairs(mlp), 0, corrected=True)
                calibrator.put(mlp, context.locked.get_submodule(mlp.module))
            return
    for mlp, pairs in capture(context.original, todo, heldout, **room):
        yield by_chain(context.original, mlp, pairs, 0)


def _students(
    context: AuditContext,
    itself: Reference,
    place: Chain,
    given: _Given,
    attempts: Sequence[tuple[int, str]],
    title: str,
    note: Callable[[str], object],
) -> Students:
    """The students of one chain.

    itself: the locked model. attempts: training tokens of a module, and initialisation, of each student.
    """
    chain, device, seed = place.net(context.locked), context.device, context.config.seed + place.number
    own, tokens = given.ours(place)
    wanted, _ = given.wanted(place)
    conversion = context.conversion.get(place.mlp.module)
    held = own.rows(torch.arange(tokens, len(own)))
    students: list[Student] = []
    best: dict[int, tuple[float, DLRNet]] = {}
    for of_module, init in attempts:
        train_tokens = place.tokens(of_module)
        what = f"{init} init, {train_tokens:,} training tokens"
        began = time.monotonic()
        try:
            net = fit_student(
                chain,
                own,
                tokens,
                train_tokens=train_tokens,
                init=init,
                seed=seed,
                name=place.name,
                device=device,
                progress=context.count(f"{title}, {what}"),
                note=note,
            )
            seconds = given.captured + time.monotonic() - began
            distance = _distance_left(context.locked, itself, place, net)
        except DLRError as reason:
            note(f"a student of {place.name} is missing ({what}): {reason}")
            continue
        error, student_error = (
            measure(net, *pairs, device).rel_error for pairs in ((wanted.x, wanted.y), held)
        )
        share = of_module / conversion if conversion else None
        students.append(Student(init, train_tokens, share, error, student_error, seconds, distance))
        if of_module not in best or distance < best[of_module][0]:
            best[of_module] = distance, net
    if best.keys() != {of_module for of_module, _ in attempts}:
        raise DLRError(f"no student of {place.name} could be distilled: try another --seed")
    chain_error = measure(chain, wanted.x, wanted.y, device).rel_error
    gap = measure(chain, *held, device).flatten_gap
    x = own.rows(random_rows(tokens, FIT_TOKENS, seed))[0].to(device, torch.float32)
    merges, shortest = merge_steps(
        chain, x, lambda net: measure(net, wanted.x, wanted.y, device).rel_error, chain_error
    )
    nets = {0: shortest} | {of_module: net for of_module, (_, net) in best.items()}
    return ModuleStudents(place.name, str(chain.spec), chain_error, gap, students, merges), nets


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


def _distance_left(locked: PreTrainedModel, itself: Reference, place: Chain, net: DLRNet) -> float:
    """How far the locked model is from itself with a student in one chain's place, on a little held-out neutral text.

    Raises:
        DLRError: As `compare` does.
    """
    with backend("naive"):  # see `structural.evaluated`
        return distance_of(itself.compare(with_chains(locked, in_places(locked, {place: net}), [])))


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
