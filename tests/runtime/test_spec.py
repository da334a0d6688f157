import random

import pytest

from dlr_lock.common.errors import DLRError
from dlr_lock.runtime import DLRNet, DLRSpec


def mlp_params(d: int, f: int, gated: bool, bias: bool) -> int:
    matrices = 3 if gated else 2
    return matrices * d * f + ((matrices - 1) * f + d if bias else 0)


@pytest.mark.parametrize("seed", range(8))
def test_parity_within_one_percent_for_any_shape(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        mlp_gated, bias, gated = (rng.random() < 0.5 for _ in range(3))
        lanes = rng.choice([1, 1, 2])
        # A step of rank 16 in every lane must itself be under 2% of the MLP, or no chain comes within 1%.
        narrowest = 50 * 16 * lanes * (3 if gated else 2) // (3 if mlp_gated else 2) + 16
        d, f = rng.randrange(64, 9000), rng.randrange(narrowest, 30000)
        depth = rng.choice([None, 12, 24, 36, 48, 97])
        spec = DLRSpec.matching(
            d, f, mlp_gated=mlp_gated, mlp_bias=bias, lanes=lanes, depth=depth, gated=gated
        )
        wanted = mlp_params(d, f, mlp_gated, bias)
        assert abs(spec.params / wanted - 1) <= 0.01, (d, f, spec)
        assert spec.rank % 16 == 0 and spec.lanes == lanes


def test_params_are_the_modules_own() -> None:
    for gated in (False, True):
        spec = DLRSpec(hidden_size=48, lanes=2, depth=3, rank=16, gated=gated)
        assert spec.params == sum(p.numel() for p in DLRNet(spec).parameters())


def test_smollm2_gets_the_measured_shape() -> None:
    for d, f, shape in (
        (576, 1536, (1, 12, 192)),
        (2048, 8192, (1, 16, 768)),  # a step's weights stream for as long as the grid waits
        (4096, 14336, (1, 37, 576)),
    ):
        spec = DLRSpec.matching(d, f, mlp_gated=True)
        assert (spec.lanes, spec.depth, spec.rank) == shape


@pytest.mark.parametrize("depth", [12, 24, 36, 48, 72, 144])
def test_a_depth_that_divides_is_met(depth: int) -> None:
    spec = DLRSpec.matching(576, 1536, mlp_gated=True, depth=depth)
    assert spec.depth == depth and spec.depth * spec.rank == 2304


def test_a_rank_is_met_exactly_and_both_are_taken_as_given() -> None:
    assert DLRSpec.matching(576, 1536, mlp_gated=True, rank=96).rank == 96
    spec = DLRSpec.matching(576, 1536, mlp_gated=True, depth=5, rank=32)
    assert (spec.depth, spec.rank) == (5, 32)


def test_a_depth_beyond_reach_gives_the_deepest_chain() -> None:
    spec = DLRSpec.matching(576, 1536, mlp_gated=True, depth=10_000)
    assert spec.rank == 16 and 143 <= spec.depth <= 145


def test_a_tiny_mlp_gets_the_nearest_count() -> None:
    spec = DLRSpec.matching(16, 24, mlp_gated=True)  # 1152 parameters; a step of rank 16 has 512
    assert (spec.depth, spec.rank) == (2, 16)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank": 24}, "multiple of 16"),
        ({"rank": 0}, "rank"),
        ({"depth": -1}, "depth"),
        ({"lanes": 1.5}, "lanes"),
        ({"hidden_size": True}, "hidden_size"),
        ({"act": "silux"}, "silux"),
        ({"gated": 1}, "gated"),
    ],
)
def test_what_makes_no_chain_is_refused(change: dict, says: str) -> None:
    values = {"hidden_size": 64, "lanes": 1, "depth": 4, "rank": 16} | change
    with pytest.raises(DLRError, match=says):
        DLRSpec(**values)


def test_dict_round_trip_and_unknown_fields() -> None:
    spec = DLRSpec(hidden_size=64, lanes=2, depth=4, rank=32, act="gelu", gated=True)
    assert DLRSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(DLRError, match="colour"):
        DLRSpec.from_dict(spec.to_dict() | {"colour": 1})
    with pytest.raises(DLRError, match="depth"):
        DLRSpec.from_dict({k: v for k, v in spec.to_dict().items() if k != "depth"})
