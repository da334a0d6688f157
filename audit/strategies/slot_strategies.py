"""All that the audit knows to train one MLP slot with: the chain's strategies, and those of the MLP that it replaced.

Three trainables: training all weights, low-rank adapters of them, or nothing in the slot, whose input has a gradient all the
same (as where adapters sit in the attention).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor
from torch.nn.functional import linear, silu

from ...microbench.slot import DenseWeights, dense_mlp
from ...runtime import DLRSpec
from ...triton_kernels import chain_reference
from .checkpoint import checkpointed, segmented, selective
from .compiled import compiled
from .inversion import inverted
from .lookahead import lookahead_trained
from .lora import Adapter, adapted_chain, low_rank, merged_chain

Forward = Callable[..., Tensor]
Trainable = Literal["weights", "adapters", "nothing"]
ADAPTER_RANK = 16  # of an MLP's matrices
BLOCKS = (128, 256, 512)  # widths of look-ahead that are tried
BUDGET = 0.5  # of what a compiled step would keep by itself


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way to run a slot's forward pass such that its backward costs what it costs.

    run: (x, weights) -> y; where adapters are trained, with `adapters` too, one (V, U) for each matrix.
    """

    name: str
    trainable: Trainable
    run: Forward
    compiled: bool = False


def chain_strategies(spec: DLRSpec) -> list[Strategy]:
    """For `ChainWeights`."""
    plain = chain_reference
    forms: dict[str, Forward] = {
        "plain": plain,
        "checkpoint": checkpointed(plain),
        "selective": selective(plain, spec.hidden_size),
        "inversion": inverted,
    }
    steps = best_segment(spec)
    if steps < spec.depth:
        segments = partial(segmented, steps=steps)
        forms |= {f"segments of {steps}": segments, f"nested, {steps}": checkpointed(segments)}
    for width in BLOCKS:
        if 1 < width // spec.rank <= spec.depth:  # else it is a step, or more than a lane
            forms[f"look-ahead {width}"] = partial(lookahead_trained, block=width)
            forms[f"look-ahead {width}, recomputed"] = partial(lookahead_trained, block=width, recompute=True)
            forms[f"look-ahead {width}, inverted"] = partial(inverted, block=width)
    forms["checkpoint, inverted"] = checkpointed(forms["inversion"])
    apart = adapted_chain
    return [
        *(Strategy(name, "weights", run) for name, run in forms.items()),
        Strategy("compiled", "weights", compiled(plain), compiled=True),
        Strategy(
            f"compiled, budget {BUDGET:g}", "weights", compiled(plain, memory_budget=BUDGET), compiled=True
        ),
        Strategy("LoRA", "adapters", apart),
        Strategy("LoRA, checkpoint", "adapters", checkpointed(apart)),
        Strategy("LoRA, selective", "adapters", selective(apart, spec.hidden_size)),
        *(
            Strategy(f"LoRA merged, {name}", "adapters", partial(merged_chain, form=forms[name]))
            for name in ("plain", "inversion", "checkpoint, inverted")
        ),
        *(
            Strategy(f"frozen, {name}", "nothing", run)
            for name, run in forms.items()
            if name in ("plain", "checkpoint", "selective") or name.startswith("segments")
        ),
    ]


def mlp_strategies(hidden_size: int) -> list[Strategy]:
    """For `DenseWeights`."""
    forms = {
        "plain": dense_mlp,
        "checkpoint": checkpointed(dense_mlp),
        "selective": selective(dense_mlp, hidden_size),
    }
    return [
        *(Strategy(name, "weights", run) for name, run in forms.items()),
        Strategy("compiled", "weights", compiled(dense_mlp), compiled=True),
        Strategy(
            f"compiled, budget {BUDGET:g}",
            "weights",
            compiled(dense_mlp, memory_budget=BUDGET),
            compiled=True,
        ),
        Strategy("LoRA", "adapters", adapted_mlp),
        Strategy("LoRA, checkpoint", "adapters", checkpointed(adapted_mlp)),
        Strategy("LoRA, selective", "adapters", selective(adapted_mlp, hidden_size)),
        *(Strategy(f"frozen, {name}", "nothing", run) for name, run in forms.items()),
    ]


def adapted_mlp(x: Tensor, weights: DenseWeights, *, adapters: list[Adapter]) -> Tensor:
    """`dense_mlp` with an adapter for each of gate, up and down, written apart."""
    gate, up, down = weights
    of_gate, of_up, of_down = adapters
    h = silu(linear(x, gate) + low_rank(x, *of_gate)) * (linear(x, up) + low_rank(x, *of_up))
    return linear(h, down) + low_rank(h, *of_down)


def adapter_rank(spec: DLRSpec) -> int:
    """The rank at which a chain's adapters have as many parameters as those of ADAPTER_RANK of a SwiGLU MLP of the
    chain's size; one at least. A chain's matrices are many and thin, so it is less: 2 for 1x36x64 in 576x1536."""
    d, r = spec.hidden_size, spec.rank
    matrices = spec.params // (d * r)
    width = spec.params / (3 * d)
    return max(1, round(ADAPTER_RANK * 3 * (d + width) / (matrices * (d + r))))


def best_segment(spec: DLRSpec) -> int:
    """Steps of a segment at which a checkpointed chain keeps and works with the least.

    K / s states of d are kept, and s steps' states and hidden units computed once more (a step's reads and h: 2 r,
    gated 4 r), so s = sqrt(K d / (d + 2 r)): Chen et al., arXiv 1604.06174, with what a step itself keeps.
    """
    d, r = spec.hidden_size, spec.rank
    return min(spec.depth, max(1, round(math.sqrt(spec.depth * d / (d + (4 if spec.gated else 2) * r)))))
