"""What a training step costs, counted: FLOPs, launches and how many wait for each other, bytes kept and at the peak.

Counts are those of `triton_kernels/meter.py`, exact and the same on every device. Seconds are the exception, and stand
apart.
"""

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from ..common.timing import now
from ..convert.evaluate import vocabulary
from ..convert.mlp_matching import mixtures
from ..triton_kernels import backend
from ..triton_kernels.meter import Counts, Meter


@dataclass(frozen=True, slots=True)
class StepCounts:
    """One training step without the optimizer's update, which is the same for all who train the same.

    Attributes:
        forward, backward: What the passes dispatch.
        saved: Bytes that autograd saves for the backward pass, parameters left out, each storage once, as
            saved_tensors_hooks show it.
        held: Bytes alive between forward and backward, the output left out; also what a selective checkpoint caches,
            which autograd's hooks do not see.
        peak: The most bytes alive at any time, gradients included, parameters left out; an operation's own scratch is
            the device's business, see `device_peak`.
    """

    forward: Counts
    backward: Counts
    saved: int
    held: int
    peak: int

    @property
    def flops(self) -> int:
        """FLOPs of both passes."""
        return self.forward.flops + self.backward.flops

    @property
    def dependent(self) -> int:
        """Dependent launches of both passes."""
        return self.forward.dependent + self.backward.dependent


def count_step(function: Callable[[Tensor], Tensor], x: Tensor, trained: Sequence[Tensor]) -> StepCounts:
    """Counts the training step of y = function(x). Nothing is changed: gradients are thrown away.

    Args:
        function: The forward pass. y's gradient is all ones.
        x: Its input, of any dtype. Where it requires a gradient, its gradient is computed too, and it counts as an
            activation of the layer before, that is, where the function keeps it.
        trained: The tensors whose gradients are computed.
    """
    meter = Meter()
    entering = x.clone() if x.requires_grad else x  # not a leaf: autograd would keep that in any case
    if x.requires_grad:
        meter.adopt(entering)
    wanted = [x, *trained] if x.requires_grad else list(trained)
    with recorded(()) as saved, meter:
        y = function(entering)
    del entering
    forward, held = meter.take(), meter.live - meter.bytes_of(y)
    kept = sum(
        meter.bytes_at(storage) for storage in saved
    )  # what was there before, such as weights, adds nothing
    with meter:
        torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)
        backward = meter.take()
    return StepCounts(forward, backward, kept, held, meter.peak)


@contextmanager
def recorded(own: Sequence[Tensor]) -> Iterator[dict[int, int]]:
    """What autograd saves within the block, by torch.autograd.graph.saved_tensors_hooks.

    Args:
        own: Tensors whose storages are left out.

    Yields:
        Bytes by the storage's address. Addresses are used twice once the graph is gone, so read it while the output
        lives.
    """
    ours = {t.untyped_storage()._cdata for t in own}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in ours:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def saved_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd saves during a forward pass; a storage that several nodes share counts once.

    DLR-Nets run as the plain chain, since their op has no backward.

    Args:
        module: Its parameters and buffers are left out.
        forward: The pass.
    """
    with recorded([*module.parameters(), *module.buffers()]) as saved, backend("naive"):
        result = forward()
    total = sum(saved.values())
    del result
    return total


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Seconds of a training step, medians: its forward and backward pass, and an update by SGD."""

    forward: float
    backward: float
    update: float

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return self.forward + self.backward + self.update


def time_step(
    function: Callable[[Tensor], Tensor], x: Tensor, trained: Sequence[Tensor], *, repeats: int = 3
) -> StepSeconds:
    """Times the step that `count_step` counts, and the update.

    The rate is 0: nothing is changed, but gradients (`.grad`) are freed.

    Args:
        function, x, trained: As for `count_step`.
        repeats: How many steps the medians are of, after a warm-up.
    """
    rounds = []
    for _ in range(repeats + 1):
        laps = [now(x.device)]
        y = function(x)
        laps.append(now(x.device))
        y.backward(torch.ones_like(y))
        laps.append(now(x.device))
        with torch.no_grad():
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=0.0)
        laps.append(now(x.device))
        rounds.append([end - start for start, end in pairwise(laps)])
        del y
        for leaf in (x, *trained):
            leaf.grad = None
    return StepSeconds(*map(statistics.median, zip(*rounds[1:], strict=True)))


def countable(model: PreTrainedModel) -> tuple[AbstractContextManager[object], Any]:
    """A copy of a model whose steps can be counted, and the mode to run it in.

    Its tensors have shapes alone. Where it has mixtures of experts, what a step does depends on the routing: the copy
    shares the model's tensors then, and runs, with stock experts one after the other, for torch counts no FLOPs of
    grouped products, and batched ones copy an expert's weights for every token.
    """
    if mixtures(model):
        ghost = copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})
        if getattr(ghost.config, "_experts_implementation", None) == "grouped_mm":
            ghost.set_experts_implementation("eager")
        return nullcontext(), ghost
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # tensors that are no parameters or buffers
    memo: dict[int, object] = {
        id(p): nn.Parameter(mode.from_tensor(p.detach()), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    memo |= {id(b): mode.from_tensor(b) for b in model.buffers()}
    return mode, copy.deepcopy(model, memo)


def step_tokens(model: PreTrainedModel, shape: tuple[int, int]) -> Tensor:
    """Token ids of this shape, int64, to count and time steps on: drawn at random, always the same, for a router gives
    equal tokens to the same experts."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary(model), shape, generator=generator).to(model.device)


def device_peak(work: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes that torch allocates on a GPU during `work()`, beyond what it had; None on other devices."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
