"""The end of a conversion: the finished chains, which lie on the disk, and the checkpoint, written shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, modeling_utils

from ..common.errors import DLRError, first_line
from ..common.quiet import no_bars, quiet
from ..common.resume import ResumeStore
from ..common.weights import OnDemand, awake, drop_mapped, drop_pages, storage
from ..runtime import DLRExperts, DLRNet, ExpertsSpec, load, lock
from .context import Context
from .evaluate import Evaluation, StateEvaluation, compare
from .layer_runner import LayerRunner, layer_by_layer
from .report import ModuleReport
from .source import Source, unplaced_tensors

SHARD = 4 * 10**9  # bytes of the checkpoint at a time: as much of what it is written from is in memory


class KeptChains(Mapping[str, DLRNet | DLRExperts]):
    """The chains of the finished modules, in the resume store: one is in memory while it is used.

    Args:
        resume: The store.
        model: The original, of whose mixtures some experts may stay.
        dtype: Of the checkpoint.
    """

    def __init__(self, resume: ResumeStore, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._resume, self._model, self._dtype = resume, model, dtype
        self._names: list[str] = []

    def add(self, name: str) -> None:
        """Takes a module in, which the store has by now."""
        self._names.append(name)

    def __getitem__(self, name: str) -> DLRNet | DLRExperts:
        module = restored(self._resume, self._model, name, self._dtype) if name in self._names else None
        if module is None:
            raise KeyError(name)
        return module[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def restored(
    resume: ResumeStore, model: PreTrainedModel, name: str, dtype: torch.dtype
) -> tuple[DLRNet | DLRExperts, ModuleReport] | None:
    """A module that was finished, its weights in their mapped file; None where it was not.

    Raises:
        DLRError: Where what is kept of it is damaged.
    """
    found = resume.get(name)
    if found is None:
        return None
    try:
        report = ModuleReport.from_dict(found[1])
        if isinstance(report.spec, ExpertsSpec):
            stock = awake(model.get_submodule(name)) if report.spec.kept else None
            experts = DLRExperts(report.spec, stock, dtype=dtype)
            experts.assign(found[0])
            return experts, report
        net = DLRNet(report.spec, dtype=dtype, device="meta")
        for key, parameter in net.named_parameters():
            tensor = found[0][key]
            if tensor.shape != parameter.shape:
                raise ValueError(f"{key} is {list(tensor.shape)}, not {list(parameter.shape)}")
            setattr(net, key, nn.Parameter(tensor.to(parameter.dtype), requires_grad=False))
    except (KeyError, TypeError, ValueError) as error:
        raise DLRError(f"what {resume.folder} keeps of {name} is damaged: delete that folder") from error
    return net, report


def write_checkpoint(context: Context, chains: Mapping[str, DLRNet | DLRExperts], work: Path) -> int:
    """Saves the source, read again in the checkpoint's dtype, with the chains in place; returns its parameters.

    Read again, because casting a loaded model would also cast what must stay in float32 (rotary frequencies).
    """
    original = context.source
    original.check_unchanged()
    weights = original.weights
    dtype = context.stored if weights is None else original.dtype  # mapped, not read
    with quiet():
        model = type(original.model).from_pretrained(original.path, dtype=dtype, use_safetensors=True)
    if weights is not None:
        _cast_on_disk(model, original, context.stored, context.scratch)
    # The stock class was locked, so that code of the repository's own for the model would be for another one.
    for config in (
        model.config,
        *(c for c in vars(model.config).values() if isinstance(c, PreTrainedConfig)),
    ):
        vars(config).pop("auto_map", None)
    lock(model, chains, context.identity, unplaced_tensors(original, [*chains, *context.identity])[0])
    with no_bars(), _shard_by_shard():
        model.save_pretrained(work, max_shard_size=SHARD)
    return model.num_parameters()


def _cast_on_disk(model: PreTrainedModel, original: Source, dtype: torch.dtype, scratch: Path) -> None:
    """The weights of a mapped model in a dtype, in files of `scratch` where that is another one than its own."""
    assert original.weights is not None
    theirs = dict(original.model.named_parameters())
    for name, parameter in model.named_parameters():
        numbers = original.weights.stored(theirs[name])
        wanted = dtype if parameter.dtype == original.dtype else parameter.dtype
        if numbers.dtype != wanted:
            room = storage(1, numbers.numel(), wanted, scratch).view(numbers.shape)
            room.copy_(numbers)
            drop_mapped([numbers])
            drop_pages(room)
            numbers = room
        parameter.data = numbers


@contextmanager
def _shard_by_shard() -> Iterator[None]:
    """What a shard was written from leaves the memory before the next one is written."""
    write = modeling_utils.safe_save_file

    def and_forget(tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        write(tensors, *args, **kwargs)
        drop_mapped(tensors.values())

    modeling_utils.safe_save_file = and_forget
    try:
        yield
    finally:
        modeling_utils.safe_save_file = write


def measure_checkpoint(
    context: Context, work: Path, runner: LayerRunner | None
) -> Evaluation | StateEvaluation:
    """The checkpoint, read back as its users will, against the original on the held-out text.

    Where the original's weights come and go, so do the locked model's, layer by layer where the model allows it.

    Args:
        context: The conversion.
        work: The checkpoint.
        runner: Of the original's layers, None where these cannot be run one at a time.
    """
    original, text = context.source, context.text.heldout
    progress = context.count("measuring the locked model")
    micro = context.micro_batch("the measuring of the model", "sequence")
    if original.weights is None:
        with quiet():
            locked = load(work, dtype=original.model.dtype, device=context.device)
        return compare(locked, original.model, text, progress, micro=micro)
    with quiet():
        locked = load(work, dtype=context.stored, device="cpu")
    original.weights.release()
    room = original.weights.room = original.weights.room // 2
    OnDemand(locked, stored=context.stored, dtype=original.model.dtype, device=context.device, room=room)
    passes = None
    if runner is not None and runner.plain:
        runners = (LayerRunner(m, context.mlps, text, like=runner) for m in (locked, original.model))
        ours, theirs = (partial(layer_by_layer, one) for one in runners)
        passes = ours, theirs
    return compare(locked, original.model, text, progress, passes, micro)


def write_words(original: Source, work: Path) -> None:
    """Saves the tokenizer, and the configs that the weights will be saved with: what refuses to be, does so now."""
    model = original.model
    parts = [model.config, *([model.generation_config] if model.can_generate() else []), original.tokenizer]
    try:
        for part in parts:
            if part is not None:
                part.save_pretrained(work)
    except (OSError, ValueError, TypeError) as error:
        raise DLRError(
            f"the {type(part).__name__} of {original.name} cannot be saved: {first_line(error)}"
        ) from error
