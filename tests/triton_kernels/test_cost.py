"""The cost model: what it counts, and that no path is chosen that it puts behind another."""

from dataclasses import replace

import pytest

from dlr_lock.runtime.spec import DLRSpec
from dlr_lock.triton_kernels import cost
from dlr_lock.triton_kernels.decode_plan import plan_decode
from dlr_lock.triton_kernels.gpu import H200
from dlr_lock.triton_kernels.rounds import Shape, chunk_tokens, class_tokens, rounds_of
from dlr_lock.triton_kernels.tiles import Tile, Work, product_seconds, tile_for

# Of models of 135M to 70B parameters: what a conversion makes of them.
MLPS = [(576, 1536), (1024, 3072), (1536, 8960), (2048, 8192), (2560, 9728), (3072, 8192), (4096, 14336),
        (5120, 25600), (8192, 28672)]  # fmt: skip
# Every number that decode takes and more; beyond, those beside the borders of tiles.
COUNTS = [*range(1, 130), *(n + more for n in range(192, 8193, 64) for more in (-1, 0, 1))]


def chain(hidden: int, intermediate: int) -> tuple[Shape, int]:
    """The default chain in an MLP's place, and the steps of its Gram blocks."""
    shape = Shape(*DLRSpec.matching(hidden, intermediate, mlp_gated=True).weight_shape, cost.USUAL_TOKENS)
    return shape, cost.best_width(shape, H200) // shape.rank


@pytest.mark.parametrize("mlp", MLPS, ids=str)
def test_no_path_is_chosen_that_another_beats_by_a_fifth(mlp: tuple[int, int]) -> None:
    """Nor tiles that others beat, though tiles are chosen for powers of two of tokens alone."""
    usual, steps = chain(*mlp)
    slow = []
    for tokens in COUNTS:
        shape = replace(usual, tokens=tokens)
        plan = cost.choose(shape, H200, steps)
        prefill = cost.predict_prefill(shape, steps * shape.rank, H200).seconds
        paths = [prefill]
        if decoding := plan_decode(shape, H200):
            paths.append(cost.predict_decode(shape, decoding, H200).seconds)
        taken = prefill if plan is None else cost.predict_decode(shape, plan, H200).seconds
        if taken > 1.2 * min(paths):
            slow.append((tokens, taken, paths))
        if tokens % 5 == 0 and tokens <= chunk_tokens(shape, steps * shape.rank):
            own, _ = cost._chunk_seconds(shape, tokens, steps, H200)
            if prefill > 1.2 * own:
                slow.append((tokens, prefill, own))
    assert not slow, f"{len(slow)}, such as {slow[:5]}"


@pytest.mark.parametrize("mlp", MLPS, ids=str)
def test_products_fill_the_device_from_sixteen_tokens_on(mlp: tuple[int, int]) -> None:
    """With the tiles that a call of any number of tokens gets; all but those of 10 MFLOP, 13 ns of the device."""
    usual, steps = chain(*mlp)
    for tokens in COUNTS[15:]:
        tiled = class_tokens(tokens)
        for one in rounds_of(replace(usual, tokens=tiled), steps):
            for work in one.works():
                tile = tile_for(work, H200)
                least = 90 if work in (one.project, one.update) or work.flops > 1e7 else 36
                assert work.programs(tile, tokens) >= least, (tokens, work, tile)


@pytest.mark.parametrize("mlp", MLPS, ids=str)
def test_nothing_is_predicted_below_its_floor_or_the_time_of_its_launches(mlp: tuple[int, int]) -> None:
    usual, steps = chain(*mlp)
    for tokens in (1, 16, 64, 512, 4096):
        shape = replace(usual, tokens=tokens)
        found = [
            cost.predict_prefill(shape, steps * shape.rank, H200),
            cost.predict_dense(shape, mlp[1], H200),
        ]
        if plan := plan_decode(shape, H200):
            found.append(cost.predict_decode(shape, plan, H200))
        for prediction in found:
            assert prediction.seconds > prediction.floor + prediction.launches * H200.launch


def test_a_product_costs_what_its_busiest_multiprocessor_reads_or_multiplies() -> None:
    work, tile = Work(512, 768, 2048), Tile(64, 64, 64)
    fixed = H200.launch + 2 * H200.latency
    bytes_read = 2048 * (64 + 64) * 2 + 64 * 64 * 4
    assert product_seconds(work, tile, H200) == pytest.approx(fixed + bytes_read / H200.sm_bandwidth)
    # One row of tiles more: 108 programs, still one each; then 144, and some have two.
    assert product_seconds(replace(work, tokens=576), tile, H200) == product_seconds(work, tile, H200)
    two = product_seconds(replace(work, tokens=768), tile, H200) - fixed
    assert two == pytest.approx(2 * (product_seconds(work, tile, H200) - fixed))
    # Where L2 is no limit the matrix units are, at half their rate in tiles of 64 columns.
    fast = replace(H200, sm_bandwidth=1e15, bandwidth=1e18)
    units = 2 * 64 * 64 * 2048 / (H200.flops / H200.sms / 2)
    assert product_seconds(work, tile, fast) == pytest.approx(fixed + units)


def test_the_mlp_is_five_launches() -> None:
    """A 135M model's at one token, where launching is nearly all: 8 to 9 us were expected by hand."""
    shape, _ = chain(576, 1536)
    dense = cost.predict_dense(replace(shape, tokens=1), 1536, H200)
    assert dense.launches == 5 and 8e-6 < dense.seconds < 10e-6


def test_launches_are_counted() -> None:
    """Two steps of a wide rank are three, and one zeroes counters where sums are split: of few tokens."""
    usual, steps = chain(2048, 8192)
    launches = [
        cost.predict_prefill(replace(usual, tokens=tokens), steps * usual.rank, H200).launches
        for tokens in (16, 4096)
    ]
    assert steps == 2 and launches == [3 * usual.depth // 2 + 1, 3 * usual.depth // 2]


@pytest.mark.parametrize("mlp", MLPS, ids=str)
def test_gram_blocks_take_an_eighth_of_the_weights_and_no_other_width_is_faster_by_a_fifth(
    mlp: tuple[int, int],
) -> None:
    usual, steps = chain(*mlp)
    room = usual.weight_bytes / 8
    assert cost.gram_bytes(usual, steps * usual.rank) <= room
    for tokens in (512, 4096):
        shape = replace(usual, tokens=tokens)
        seconds = {
            n: cost.predict_prefill(shape, n * usual.rank, H200).seconds
            for n in range(1, 9)
            if cost.gram_bytes(usual, n * usual.rank) <= room
        }
        assert seconds[steps] < 1.2 * min(seconds.values()), (tokens, seconds)
