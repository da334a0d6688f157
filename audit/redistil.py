"""Re-distillation: every chain of a locked model back into an MLP of its size, on the attacker's text.

One module at a time, from activations of the locked model alone: the attacker has no original. The original serves
to say how good the students are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..common.errors import DLRError
from ..common.progress import Progress
from ..common.resume import ResumeStore
from ..convert.activations import Activations, capture
from ..convert.end_to_end import with_chains
from ..convert.evaluate import measure
from ..convert.mlp_matching import MLP
from ..convert.muon import Muon
from ..convert.redistill import BATCH, FIT_TOKENS, fit_student
from ..runtime import DLRNet, DLRSpec
from .meters import count
from .report import ModuleStudents, Structural, Student
from .structural import evaluated

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Students = tuple[ModuleStudents, dict[int, DLRNet]]  # a module's students, and the best one by train_tokens


def redistil(
    locked: PreTrainedModel,
    original: PreTrainedModel,
    mlps: Sequence[MLP],
    train: Tensor,
    heldout: Tensor,
    *,
    train_tokens: Sequence[int],
    inits: Sequence[str] = ("linear", "random"),
    conversion: Mapping[str, int | None],
    device: torch.device,
    max_memory: int,
    scratch: Path,
    seed: int = 0,
    kept: ResumeStore | None = None,
    progress: Progress = lambda what, done, total: None,
    note: Callable[[str], object] = lambda sentence: None,
) -> Iterator[Students]:
    """Yields, for each module in the order given, the figures of its students and, by train_tokens, the best copy: of the
    lowest error against the chain, float32 on the CPU.

    mlps: the original's MLPs that are locked. train [S, n], heldout [H, n]: the attacker's text, and the text to
    measure on. train_tokens: training tokens of a copy, each from each of `inits` (see `convert.redistill`). conversion: token
    train_tokens by module. max_memory, scratch: as for `capture`. seed: a module's draws depend on it and its layer alone.
    kept: finished modules, which are taken from there. Neither model is changed.
    A copy that diverges is left out, and `note` called with a sentence. Raises DLRError where all of a module with
    the same train_tokens do, and as `capture` does.
    """
    before = {mlp.module: _restored(kept, mlp.module) for mlp in mlps}
    todo = [mlp for mlp in mlps if before[mlp.module] is None]
    tokens = torch.cat([train, heldout])
    rows = len(tokens) + len(heldout)
    own, wanted = (
        capture(
            model,
            todo,
            text,
            max_memory=max_memory * len(text) // rows,
            scratch=scratch,
            progress=partial(progress, f"activations of the {name} model"),
        )
        for model, text, name in ((locked, tokens, "locked"), (original, heldout, "original"))
    )
    for number, mlp in enumerate(mlps, 1):
        done = before[mlp.module]
        if done is None:
            began = time.monotonic()
            pairs = next(own)[1]
            captured = time.monotonic() - began
            notes: list[str] = []
            figures, nets = _copies(
                mlp.module,
                locked.get_submodule(mlp.module),
                pairs,
                next(wanted)[1],
                train.numel(),
                [(count, init) for count in sorted(train_tokens) for init in inits],
                conversion.get(mlp.module),
                device,
                seed + mlp.layer,
                partial(_said, progress, f"re-distilling {mlp.module} ({number} of {len(mlps)})"),
                notes.append,
                captured,
            )
            done = figures, nets, notes
            if kept is not None:
                _keep(kept, mlp.module, *done)
        for sentence in done[2]:
            note(sentence)
        yield done[:2]


def _said(progress: Progress, title: str, what: str, done: int, total: int) -> None:
    progress(f"{title}, {what}", done, total)


def _copies(
    module: str,
    chain: DLRNet,
    own: Activations,
    wanted: Activations,
    tokens: int,
    attempts: Sequence[tuple[int, str]],
    conversion: int | None,
    device: torch.device,
    seed: int,
    progress: Progress,
    note: Callable[[str], object],
    captured: float,
) -> Students:
    """own: of the chain in the locked model, `tokens` rows of the attacker's text first; wanted: of the original MLP,
    held out. attempts: train_tokens and init of each copy. captured: seconds that getting `own` took."""
    held = own.rows(torch.arange(tokens, len(own)))
    students: list[Student] = []
    best: dict[int, tuple[float, DLRNet]] = {}
    for train_tokens, init in attempts:
        began = time.monotonic()
        try:
            net = fit_student(
                chain,
                own,
                tokens,
                train_tokens=train_tokens,
                init=init,
                seed=seed,
                name=module,
                device=device,
                progress=partial(progress, f"{init} init, {train_tokens:,} training tokens"),
                note=note,
            )
        except DLRError as reason:
            note(f"a copy of {module} is missing ({init} init, {train_tokens:,} training tokens): {reason}")
            continue
        seconds = captured + time.monotonic() - began
        error, student_error = (
            measure(net, *pairs, device).rel_error for pairs in ((wanted.x, wanted.y), held)
        )
        made = Student(
            init,
            train_tokens,
            train_tokens / conversion if conversion else None,
            error,
            student_error,
            seconds,
        )
        students.append(made)
        if train_tokens not in best or student_error < best[train_tokens][0]:
            best[train_tokens] = student_error, net
    if best.keys() != {train_tokens for train_tokens, _ in attempts}:
        raise DLRError(f"no copy of {module} could be distilled: try another --seed")
    chain_error = measure(chain, wanted.x, wanted.y, device).rel_error
    gap = measure(chain, *held, device).flatten_gap
    nets = {train_tokens: net for train_tokens, (_, net) in best.items()}
    return ModuleStudents(module, str(chain.spec), chain_error, gap, students), nets


def redistil_flops(
    net: DLRNet, chain: DLRSpec, train_tokens: int, init: str, *, model_params: int, tokens: int
) -> int:
    """FLOPs of making one copy `net` of one chain: the fit, its optimizer's steps, the forward pass that gives x and
    y, and the least squares of the init where that is 'linear'.

    model_params: of the model's body, without embeddings, which are looked up, over its modules. tokens: of the
    attacker's text; fewer are run where the train_tokens are fewer.
    """
    d, used = chain.hidden_size, min(train_tokens, tokens)
    fit = 6 * net.spec.params * train_tokens
    steps = -(-train_tokens // min(BATCH, train_tokens)) * step_flops(net.spec)
    forward = 2 * model_params * used
    solved = 2 * min(used, FIT_TOKENS) * d * d * (chain.lanes * chain.depth + 1) if init == "linear" else 0
    return fit + steps + forward + solved


@lru_cache
def step_flops(spec: DLRSpec) -> int:
    """FLOPs of one step of Muon on a chain, counted."""
    with FakeTensorMode():
        net = DLRNet(spec, dtype=torch.float32)
        weights = [getattr(net, name).requires_grad_() for name in net.weight_names(spec)]
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        return count(Muon([{"params": weights, "lr": 0.0}]).step).flops


def redistil_row(
    locked: PreTrainedModel,
    original: PreTrainedModel,
    modules: Sequence[Students],
    heldout: Tensor,
    *,
    name: str,
    train_tokens: int,
    tokens: int,
    progress: Progress = lambda what, done, total: None,
) -> Structural:
    """The best students of so many train_tokens in the chains' places, against the original on heldout [H, n]. modules: what
    `redistil` yielded; tokens: of its training text. flops and seconds are those of the best students alone."""
    nets = {figures.module: made[train_tokens] for figures, made in modules}
    best = {
        figures.module: min(
            (c for c in figures.students if c.train_tokens == train_tokens), key=lambda c: c.student_error
        )
        for figures, _ in modules
    }
    body = locked.base_model.num_parameters(exclude_embeddings=True)
    flops = sum(
        redistil_flops(
            net,
            locked.get_submodule(module).spec,
            train_tokens,
            best[module].init,
            model_params=body // len(nets),
            tokens=tokens,
        )
        for module, net in nets.items()
    )
    return Structural(
        name,
        "every chain is distilled back into an MLP of its size, on its own outputs",
        evaluated(with_chains(locked, nets, []), original, heldout, name, progress),
        "MLP",
        train_tokens,
        flops,
        sum(copy.seconds for copy in best.values()),
    )


def _keep(
    kept: ResumeStore, module: str, students: ModuleStudents, nets: dict[int, DLRNet], notes: list[str]
) -> None:
    tensors = {
        f"{train_tokens}.{name}": t
        for train_tokens, net in nets.items()
        for name, t in net.state_dict().items()
    }
    specs = {str(train_tokens): net.spec.to_dict() for train_tokens, net in nets.items()}
    kept.put(module, tensors, {"students": asdict(students), "specs": specs, "notes": notes})


def _restored(
    kept: ResumeStore | None, module: str
) -> tuple[ModuleStudents, dict[int, DLRNet], list[str]] | None:
    """A module that an interrupted audit finished, None where it did not."""
    found = kept.get(module) if kept is not None else None
    if found is None:
        return None
    tensors, figures = found
    try:
        values = figures["students"]
        students = ModuleStudents(**values | {"students": [Student(**copy) for copy in values["students"]]})
        nets = {}
        for train_tokens, spec in figures["specs"].items():
            net = nets[int(train_tokens)] = DLRNet(DLRSpec.from_dict(spec), dtype=torch.float32)
            net.assign({name: tensors[f"{train_tokens}.{name}"] for name in net.state_dict()})
        return students, nets, figures["notes"]
    except (KeyError, TypeError, ValueError) as error:
        raise DLRError(f"what is kept of {module} is damaged: delete that folder") from error
