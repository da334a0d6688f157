"""Re-distillation: every chain of a locked model back into an MLP of its size, on the attacker's text.

One module at a time, from activations of the locked model alone: the attacker has no original. The original serves
to say how good the copies are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..convert.capture import Activations, capture
from ..convert.endtoend import with_chains
from ..convert.fidelity import measure
from ..convert.kept import Kept
from ..convert.mlps import MLP
from ..convert.modules import Progress
from ..convert.unlock import fit_copy
from ..runtime import DLRError, DLRNet, DLRSpec
from .report import Copy, ModuleCopies, Structural
from .structural import evaluated

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Module = tuple[ModuleCopies, DLRNet]


def redistil(
    locked: PreTrainedModel,
    original: PreTrainedModel,
    mlps: Sequence[MLP],
    train: Tensor,
    heldout: Tensor,
    *,
    visits: Sequence[int],
    starts: Sequence[str] = ("linear", "random"),
    conversion: Mapping[str, int | None],
    device: torch.device,
    max_memory: int,
    scratch: Path,
    seed: int = 0,
    kept: Kept | None = None,
    progress: Progress = lambda what, done, total: None,
    note: Callable[[str], object] = lambda sentence: None,
) -> Iterator[_Module]:
    """Yields, for each module in the order given, the figures of its copies and the best copy, float32 on the CPU.

    mlps: the original's MLPs that are locked. train [S, n], heldout [H, n]: the attacker's text, and the text to
    measure on. visits: token visits of a copy, each from each of `starts` (see `convert.unlock`). conversion: token
    visits by module. max_memory, scratch: as for `capture`. seed: a module's draws depend on it and its layer alone.
    kept: finished modules, which are taken from there. The best copy has the lowest error against the chain of
    those with the most visits. Neither model is changed.
    A copy that diverges is left out, and `note` called with a sentence. Raises DLRError where all of a module do,
    and as `capture` does.
    """
    before = {mlp.module: _restored(kept, mlp.module) for mlp in mlps}
    todo = [mlp for mlp in mlps if before[mlp.module] is None]
    tokens = torch.cat([train, heldout])
    rows = len(tokens) + len(heldout)
    captured = zip(
        *(
            capture(
                model,
                todo,
                text,
                max_memory=max_memory * len(text) // rows,
                scratch=scratch,
                progress=partial(progress, f"activations of the {name} model"),
            )
            for model, text, name in ((locked, tokens, "locked"), (original, heldout, "original"))
        ),
        strict=True,
    )
    for number, mlp in enumerate(mlps, 1):
        done = before[mlp.module]
        if done is None:
            (_, own), (_, wanted) = next(captured)
            done = _copies(
                mlp.module,
                locked.get_submodule(mlp.module),
                own,
                wanted,
                train.numel(),
                [(count, start) for count in sorted(visits) for start in starts],
                conversion.get(mlp.module),
                device,
                seed + mlp.layer,
                partial(_said, progress, f"re-distilling {mlp.module} ({number} of {len(mlps)})"),
                note,
            )
            if kept is not None:
                figures = {"copies": asdict(done[0]), "spec": done[1].spec.to_dict()}
                kept.put(mlp.module, done[1].state_dict(), figures)
        yield done


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
) -> _Module:
    """own: of the chain in the locked model, `tokens` rows of the attacker's text first; wanted: of the original MLP,
    held out. attempts: visits and start of each copy, visits ascending."""
    held = own.rows(torch.arange(tokens, len(own)))
    copies: list[Copy] = []
    best: tuple[Copy, DLRNet] | None = None
    for visits, start in attempts:
        began = time.monotonic()
        try:
            net = fit_copy(
                chain,
                own,
                tokens,
                visits=visits,
                start=start,
                seed=seed,
                name=module,
                device=device,
                progress=partial(progress, f"{start} start, {visits:,} visits"),
                note=note,
            )
        except DLRError as reason:
            note(f"a copy of {module} is missing ({start} start, {visits:,} visits): {reason}")
            continue
        seconds = time.monotonic() - began
        error, copy_error = (measure(net, *pairs, device).rel_error for pairs in ((wanted.x, wanted.y), held))
        made = Copy(start, visits, visits / conversion if conversion else None, error, copy_error, seconds)
        copies.append(made)
        if best is None or visits > best[0].visits or copy_error < best[0].copy_error:
            best = made, net
    if best is None:
        raise DLRError(f"no copy of {module} could be distilled: try another --seed")
    chain_error = measure(chain, wanted.x, wanted.y, device).rel_error
    gap = measure(chain, *held, device).flatten_gap
    return ModuleCopies(module, str(chain.spec), chain_error, gap, copies), best[1]


def best_copy(module: ModuleCopies) -> Copy:
    """The copy that `redistil` gave along with these figures."""
    return min(module.copies, key=lambda copy: (-copy.visits, copy.copy_error))


def redistil_flops(params: Sequence[int], visits: int, *, model_params: int, tokens: int) -> int:
    """FLOPs of one copy of each module: 6 a parameter and visit for the fits, and 2 a parameter of the model and token
    for the forward pass that gives every x and y.

    params: of each copy. model_params: of the model's body, without embeddings, which are looked up. tokens: of the
    attacker's text; fewer are used where the visits are fewer. The linear start's least squares are left out, which
    is in the attacker's favour.
    """
    return 6 * sum(params) * visits + 2 * model_params * min(visits, tokens)


def redistil_row(
    locked: PreTrainedModel,
    original: PreTrainedModel,
    modules: Sequence[_Module],
    heldout: Tensor,
    *,
    tokens: int,
    progress: Progress = lambda what, done, total: None,
) -> Structural:
    """The best copies in the chains' places, against the original on heldout [H, n]. modules: what `redistil` yielded;
    tokens: of its training text. flops and seconds are those of the best copies alone."""
    nets = {figures.module: net for figures, net in modules}
    best = [best_copy(figures) for figures, _ in modules]
    visits = max(copy.visits for copy in best)
    body = locked.base_model.num_parameters(exclude_embeddings=True)
    return Structural(
        "re-distil",
        "every chain is distilled back into an MLP of its size, on its own outputs",
        evaluated(with_chains(locked, nets, []), original, heldout, "re-distil", progress),
        "MLP",
        visits,
        redistil_flops([net.spec.params for net in nets.values()], visits, model_params=body, tokens=tokens),
        sum(copy.seconds for copy in best),
    )


def _restored(kept: Kept | None, module: str) -> _Module | None:
    """A module that an interrupted audit finished, None where it did not."""
    found = kept.get(module) if kept is not None else None
    if found is None:
        return None
    tensors, figures = found
    try:
        values = figures["copies"]
        copies = ModuleCopies(**values | {"copies": [Copy(**copy) for copy in values["copies"]]})
        net = DLRNet(DLRSpec.from_dict(figures["spec"]), dtype=torch.float32)
        net.assign(tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise DLRError(f"what is kept of {module} is damaged: delete that folder") from error
    return copies, net
