"""One step of a fit, counted: the conversion's own code runs on the meta device under a meter.

What is dear and of our own making is not reckoned by a formula.
"""

from dataclasses import dataclass
from functools import cache

import torch

from ...common.dtypes import product_dtype
from ...common.micro_batch import MicroBatch
from ...runtime import DLRNet, DLRSpec
from ...triton_kernels.meter import Meter
from ..config import Recipe
from ..distill import Gradients, muon_groups
from ..muon import Muon
from ..parallel.ranks import ALONE, Reckoned


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a fit.

    Attributes:
        passes: FLOPs of both passes, in `product_dtype`.
        reading: FLOPs of the products with the reading preconditioner, in the same.
        muon: FLOPs of the rest of the optimizer, in float32.
        held: Bytes alive at the peak: weights, gradients, momentum, the last good state and what is between them.
    """

    passes: int
    reading: int
    muon: int
    held: int

    @property
    def flops(self) -> int:
        """All of them."""
        return self.passes + self.reading + self.muon


@cache
def step_of(spec: DLRSpec, recipe: Recipe, parts: int, processes: int = 1) -> Step:
    """Counts one step of `distill`, by running its code on the meta device.

    Args:
        spec: The chain.
        recipe: Its batch, and whether the reading directions have a preconditioner, are what counts.
        parts: How many parts a batch is worked on in at the same time, each with gradients of its own.
        processes: How many take the step together; counted is the first one's part, with a mean share of the batch.
    """
    d = spec.hidden_size
    tokens = recipe.batch + int(recipe.batch * 4 / 512)
    meter = Meter()
    with torch.device("meta"):
        weights = {name: torch.empty(spec.weight_shape) for name in DLRNet.weight_names(spec)}
        x = torch.empty(max(1, tokens // (parts * processes)), d)
        one = torch.ones(d)
        preconditioner = torch.empty(d, d, dtype=product_dtype(x.device, d))
        groups = muon_groups(weights, recipe, preconditioner)
        ranks = Reckoned(processes) if processes > 1 else ALONE
        optimizer = Muon(groups, momentum=recipe.momentum, ranks=ranks)
        with Gradients(spec, one, one, MicroBatch("a step", "token")) as gradients, meter:
            gradients.fill(weights, x, x, len(x))
        passes, of_passes = meter.take().flops, meter.peak
        own = sum(w.grad.nbytes for w in weights.values() if w.grad is not None)
        with meter:
            optimizer.step()
        steps, of_step = meter.take().flops, meter.peak
        with meter:
            optimizer.step()  # with a momentum that is there already
        of_step = max(of_step, meter.peak)
        meter.take()
        for group in optimizer.param_groups:
            group["preconditioner"] = None
        with meter:
            optimizer.step()
        muon = meter.take().flops
    size = sum(w.nbytes for w in weights.values())
    # Weights, the last good state, momentum (of which the meter sees the first step's), and the parts' gradients.
    held = 2 * size + max(parts * of_passes + size + (parts > 1) * own, of_step + (parts - 1) * own)
    if processes > 1:
        held = max(
            held, 3 * size + (parts + 1) * own
        )  # gradients, and a copy of all of them that is exchanged
    return Step(passes * parts, steps - muon, muon, held)
