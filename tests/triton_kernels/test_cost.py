"""The cost model: what it counts, and that no path is chosen that it puts behind another."""

from dataclasses import replace

import pytest

from dlr_lock.runtime.spec import DLRSpec
from dlr_lock.triton_kernels import cost
from dlr_lock.triton_kernels.gpu import H200
from dlr_lock.triton_kernels.rounds import Shape, chunk_tokens, class_tokens
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
        if decoding := cost.decode_plan(shape, H200, steps):
            paths.append(cost.predict_decode(shape, decoding, H200).seconds)
        taken = prefill if plan is None else cost.predict_decode(shape, plan, H200).seconds
        if taken > 1.2 * min(paths):
            slow.append((tokens, taken, paths))
        if tokens % 5 == 0 and tokens <= chunk_tokens(shape, steps * shape.rank):
            own, _ = cost._chunk_seconds(shape, tokens, steps, H200)
            if prefill > 1.2 * own:
                slow.append((tokens, prefill, own))
    assert not slow, f"{len(slow)}, such as {slow[:5]}"
