"""The shape of one DLR-Net, validated where it is made."""

import math
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

from ..common.errors import DLRError
from ..triton_kernels import ACTIVATIONS

RANK_MULTIPLE = 16  # the narrowest tile of the matrix units
# SmolLM2's MLPs (d 576, f 1536) are fitted as well by 12 steps as by 18, 36 or 144 of as many parameters in all, within
# 2%, and cost as much to undo (docs/experiments/lock-strength.md): depth buys memory in training, and is paid for in
# decoding.
DEPTHS = (12, 36)  # the least and the most, where nothing else is wished for
# Parameters that an H200 streams in 16 bits (4.3 TB/s) in 1.35 us, what a step was first taken to cost. The cost model
# now says 2.4 us, which 5.2e6 would hide, and of the MLP's time 1.3 at d = 2048, 1.1 at 4096, 1.4 at 1536, 2560 and
# 3072, 1.4 to 1.8 beyond 4224; and 2.2 to 2.6 below, where 12 steps are too many already.
HIDING_STEP = 2.9e6
PARITY = 0.01


@dataclass(frozen=True, slots=True)
class DLRSpec:
    """The shape of a DLR-Net.

    Attributes:
        hidden_size: Features of the model, d.
        lanes: Chains side by side, L.
        depth: Steps of each, K.
        rank: Of a step, r: a multiple of 16.
        act: Any activation that transformers names.
        gated: Whether steps carry a third matrix, as those of students in a redistillation do; no lock has it.

    Raises:
        DLRError: Where a value makes no chain.
    """

    hidden_size: int
    lanes: int
    depth: int
    rank: int
    act: str = "silu"
    gated: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "lanes", "depth", "rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DLRError(f"a chain's {name} must be a whole number of at least 1, not {value!r}")
        if self.rank % RANK_MULTIPLE:
            raise DLRError(f"a chain's rank must be a multiple of {RANK_MULTIPLE}, not {self.rank}")
        if self.act not in ACTIVATIONS:
            raise DLRError(f"unknown activation {self.act!r}; one of {', '.join(sorted(ACTIVATIONS))}")
        if not isinstance(self.gated, bool):
            raise DLRError(f"a chain's gated must be true or false, not {self.gated!r}")

    @property
    def matrices(self) -> int:
        """Matrices a step: A and B, and G where it is gated."""
        return 3 if self.gated else 2

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """[L, K, r, d], the shape of A, B and G."""
        return self.lanes, self.depth, self.rank, self.hidden_size

    @property
    def params(self) -> int:
        """Parameters: the steps' matrices, and the output scale and bias."""
        return self.matrices * math.prod(self.weight_shape) + 2 * self.hidden_size

    @classmethod
    def matching(
        cls,
        hidden_size: int,
        intermediate_size: int,
        *,
        mlp_gated: bool,
        mlp_bias: bool = False,
        **wishes: Any,
    ) -> "DLRSpec":
        """The DLR-Net with as many parameters as an MLP, within 1%.

        Where no multiple of 16 comes within 1% (small MLPs: a step of rank 16 is then more than 2% of them), the
        nearest parameter count is taken.

        Args:
            hidden_size, intermediate_size: The MLP's d and f.
            mlp_gated: Whether the MLP has three matrices, not two.
            mlp_bias: Whether it has biases.
            **wishes: lanes, depth, rank, act and gated, as for `of_params`.

        Raises:
            DLRError: Where a value makes no chain.
        """
        matrices = 3 if mlp_gated else 2
        params = matrices * hidden_size * intermediate_size
        if mlp_bias:
            params += (matrices - 1) * intermediate_size + hidden_size
        return cls.of_params(hidden_size, params, **wishes)

    @classmethod
    def of_params(
        cls,
        hidden_size: int,
        params: int,
        *,
        lanes: int = 1,
        depth: int | None = None,
        rank: int | None = None,
        act: str = "silu",
        gated: bool = False,
    ) -> "DLRSpec":
        """`matching` for an MLP of which only the parameter count is known.

        Args:
            hidden_size: Features of the model, d.
            params: The MLP's parameters.
            lanes, act, gated: As in `DLRSpec`.
            depth: A wish: the nearest depth that keeps parity is taken; without one a depth near `default_depth`, with
                a rank that is a multiple of 64, as the solve's tiles are, where there is one.
            rank: Met exactly; with a depth besides there is nothing left to match.

        Raises:
            DLRError: Where a value makes no chain.
        """
        smallest = cls(hidden_size, lanes, depth or 1, rank or RANK_MULTIPLE, act, gated)  # validates
        if depth is not None and rank is not None:
            return smallest
        unit = smallest.matrices * hidden_size * lanes * RANK_MULTIPLE
        exact = (params - 2 * hidden_size) / unit  # of K * r / 16 that give the MLP's parameters
        slack = PARITY * params / unit
        counts = range(math.ceil(exact - slack), math.floor(exact + slack) + 1)
        shapes = [s for n in counts if n > 0 for s in _factors(n, rank)]
        if not shapes:
            step = 1 if rank is None else rank // RANK_MULTIPLE
            shapes = list(_factors(max(1, round(exact / step)) * step, rank))

        def badness(shape: tuple[int, int]) -> tuple[float, ...]:
            steps, r = shape
            off_depth = abs(math.log(steps / (depth or default_depth(params))))
            odd_rank = float(r % 64 != 0)
            off_parity = abs(steps * r / RANK_MULTIPLE - exact)
            if depth is not None:
                return off_depth, odd_rank, off_parity
            return odd_rank * math.log(1.25) + off_depth, off_parity  # a quarter more steps for whole tiles

        steps, r = min(shapes, key=badness)
        return cls(hidden_size, lanes, steps, r, act, gated)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DLRSpec":
        """The inverse of `to_dict`; raises DLRError on missing or unknown fields."""
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            odd = ", ".join(sorted(known ^ set(values)))
            raise DLRError(
                f"a chain's description must have exactly {sorted(known)}; missing or unknown: {odd}"
            )
        return cls(**values)

    def __str__(self) -> str:
        return f"{self.lanes}x{self.depth}x{self.rank} {self.act}{' gated' if self.gated else ''}"


def default_depth(params: int) -> float:
    """Steps of the deepest chain of so many parameters whose steps hide the wait for one another, within DEPTHS."""
    least, most = DEPTHS
    return min(most, max(least, params / HIDING_STEP))


@cache  # asked 50 times for each MLP of a model; 9 s of a plan of 40 layers are 3 with it
def _factors(units: int, rank: int | None) -> list[tuple[int, int]]:
    """All (depth, rank) with depth * rank = 16 * units, or the one of the given rank."""
    ranks = range(1, units + 1) if rank is None else [rank // RANK_MULTIPLE]
    return [(units // n, n * RANK_MULTIPLE) for n in ranks if units % n == 0]
