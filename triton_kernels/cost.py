"""What a DLR-Net should cost: counted bytes, FLOPs and dependent steps, times a device's constants.

The same counts give the floor (what no implementation can beat), the prediction for each path, and so the choice
between them. Constants without a measurement of ours name their source (`gpu.py`); `dlr-lock bench --explain` prints
all.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import ceil

from torch import Tensor

from .decode_plan import DecodePlan, plan_decode
from .gpu import Device, device_constants
from .lookahead import BLOCK, SOLVED, block_steps
from .rounds import Round, Shape, chunk_tokens, class_tokens, rounds_of
from .tiles import product_seconds, tile_for

_GRAM_SHARE = 1 / 8  # of the weights' memory, which Gram blocks of wide steps may take
USUAL_TOKENS = 4096  # of a long prefill
_USUAL = (1, 512, USUAL_TOKENS)  # for which the width of Gram blocks is chosen


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one path should take."""

    path: str  # "decode", "prefill" or "dense"
    seconds: float
    floor: float  # seconds, see `floor_seconds`
    launches: int  # kernels
    rounds: int  # dependent grid-wide steps


def floor_seconds(shape: Shape, device: Device) -> float:
    """Seconds that no implementation can beat: the bytes of the weights, x and y at the device's bandwidth, or the
    chain's FLOPs at its rate, whichever takes longer."""
    moved = shape.weight_bytes + 2 * shape.tokens * shape.hidden * shape.itemsize
    return max(moved / device.bandwidth, shape.flops / device.flops)


def predict_decode(shape: Shape, plan: DecodePlan, device: Device) -> Prediction:
    """What a decode kernel should take: a step is the path from one arrival to the next, or its weights' stream."""
    # A CTA gets its share of the device's bandwidth, and no more than a multiprocessor does.
    each = shape.weight_bytes / plan.depth / plan.ctas
    stream = each / min(device.sm_bandwidth, device.bandwidth / plan.ctas)
    unread = stream * (1 - plan.held / plan.tiles)  # what is read only when it is wanted
    p, u = 4 * shape.tokens * plan.rows, 4 * shape.tokens * plan.width
    if plan.tokens == 1:
        adds, read = 4 * plan.ctas * plan.rank / device.atomics, 4 * plan.rank
        counted = float(plan.ctas)  # that arrive at a counter
        # Sums over columns and rows, by ordinary units and then among warps
        work = 2 * plan.tiles * plan.rows * plan.columns / device.units + 10 * device.sync
    else:
        adds, read = plan.ctas * (p + u) / device.atomics, p + u
        counted = (plan.parts + plan.groups) / 2
        chain = plan.tiles * plan.columns + plan.rows  # what a sum, and then another, goes over
        work = ceil(chain / 16) * device.mma + 20 * device.sync
    exchange = device.latency + device.wait(counted) + device.latency
    serial = adds + plan.barriers * exchange + read / device.sm_bandwidth + work
    # From the last of its weights to the next arrival, and until what is asked for then comes, a CTA reads none.
    idle = adds / plan.barriers + work / 2 + 2 * device.latency
    # Weights that were asked for a step ahead are in L2, and memory streams on meanwhile.
    step = (
        max(serial, stream, each / device.sm_bandwidth + idle) if plan.ahead else max(serial, stream + idle)
    )
    # Its launch, and that which zeroes its memory
    seconds = 2 * device.launch + 2 * device.latency + plan.depth * (step + unread)
    return Prediction("decode", seconds, floor_seconds(shape, device), 2, plan.barriers * plan.depth)


def predict_prefill(shape: Shape, width: int, device: Device) -> Prediction:
    """What prefill should take with Gram blocks of `width` columns: the sum of its launches."""
    block = block_steps(width, shape.depth, shape.rank)
    chunk = chunk_tokens(shape, width)
    whole, left = divmod(shape.tokens, chunk)
    tiled = min(class_tokens(shape.tokens), chunk)
    seconds, launches = 0.0, 0
    for tokens, times in ((chunk, whole), (left, 1)):
        if tokens and times:
            of_chunk, count = _chunk_seconds(replace(shape, tokens=tokens), tiled, block, device)
            seconds, launches = seconds + times * of_chunk, launches + times * count
    rounds = ceil(shape.depth / block)
    return Prediction("prefill", seconds, floor_seconds(shape, device), launches, rounds)


def _chunk_seconds(shape: Shape, tiled: int, block: int, device: Device) -> tuple[float, int]:
    """Seconds and launches of one chunk, with the tiles for `tiled` tokens."""
    seconds, launches, split = 0.0, 0, False
    rounds = list(rounds_of(shape, block))
    for one, times in Counter(rounds).items():
        for work in one.works():
            tile = tile_for(replace(work, tokens=tiled), device)
            seconds, launches = seconds + times * product_seconds(work, tile, device), launches + times
            split |= tile.split > 1
        if one.solved:
            seconds, launches = seconds + times * _solve_seconds(shape, one, device), launches + times
    if split:  # their counters are zeroed
        seconds, launches = seconds + device.launch, launches + 1
    if not rounds[-1].finishes:  # the lanes are summed by torch, in four
        moved = 4 * shape.tokens * shape.hidden * (shape.lanes + 6)
        seconds, launches = seconds + 4 * device.launch + moved / device.bandwidth, launches + 4
    return seconds, launches


def _solve_seconds(shape: Shape, one: Round, device: Device) -> float:
    """A program of 64 tokens does its steps one after another, and a multiprocessor two programs at a time."""
    programs = ceil(shape.tokens / 64) * shape.lanes
    columns = one.steps * shape.rank
    grams = one.steps * (one.steps - 1) // 2 * shape.rank**2 * shape.itemsize
    moved = min(64, shape.tokens) * columns * (4 + shape.itemsize) + grams
    most, waves = ceil(programs / device.sms), ceil(programs / (2 * device.sms))
    seconds = max(most * moved / device.sm_bandwidth, waves * one.steps * device.step)
    return device.launch + 2 * device.latency + seconds


def predict_dense(shape: Shape, width: int, device: Device) -> Prediction:
    """What a gated MLP of `width` hidden units in the chain's place should take, in the five launches of torch: gate,
    up, activation, product, down. Its products are taken to reach the device's rates at any size."""
    elements = 3 * shape.hidden * width
    memory, flops = elements * shape.itemsize / device.bandwidth, 2 * shape.tokens * elements / device.flops
    hidden = (
        5 * shape.tokens * width * shape.itemsize
    )  # the activation reads one and writes one, the product 2 and 1
    between = hidden / (device.bandwidth if hidden > device.l2 else device.sms * device.sm_bandwidth)
    seconds = 5 * (device.launch + 2 * device.latency) + max(memory, flops) + between
    return Prediction("dense", seconds, max(memory, flops), 5, 5)


def gram_bytes(shape: Shape, width: int) -> int:
    """Bytes of Gram blocks of at most `width` columns, as `gram_blocks` makes them."""
    steps = block_steps(width, shape.depth, shape.rank)
    tiles = ceil(shape.depth / steps) * steps * (steps - 1) // 2
    return shape.lanes * tiles * shape.rank**2 * shape.itemsize


def gram_width(A: Tensor) -> int:
    """The width of Gram blocks, in columns, that suits a chain's weights.

    Args:
        A: One of them, [L, K, r, d], of their dtype, on the device on which the chain will run.

    Returns:
        What `gram_blocks` takes as `block`.
    """
    if not A.is_cuda:
        return BLOCK
    return best_width(Shape.of(A, USUAL_TOKENS), device_constants(A.device.index or 0))


@cache
def best_width(shape: Shape, device: Device) -> int:
    """The width of Gram blocks, in columns, at which a chain should be nearest to its floors.

    Tried are, of steps that are solved, as many as a solve takes and the power of two before that, whose columns tiles
    divide; of wide ones one to eight, whose blocks may take an eighth of the weights' bytes.

    Args:
        shape: The chain, on any number of tokens.
        device: The GPU.

    Returns:
        The width at which the product of the predictions for 1, 512 and 4,096 tokens over their floors is the least.
    """
    depth, rank = shape.depth, shape.rank
    if rank <= SOLVED:
        most = block_steps(depth * rank, depth, rank)
        steps = {most, 1 << most.bit_length() - 1}
    else:
        room = _GRAM_SHARE * shape.weight_bytes
        steps = {n for n in range(1, min(8, depth) + 1) if gram_bytes(shape, n * rank) <= room}
    usual = [replace(shape, tokens=tokens) for tokens in _USUAL]
    return rank * min(steps, key=lambda n: (math.prod(_over_floor(s, n * rank, device) for s in usual), n))


def _over_floor(shape: Shape, width: int, device: Device) -> float:
    """Predicted seconds of the faster path over the floor."""
    seconds = predict_prefill(shape, width, device).seconds
    if plan := plan_decode(shape, device):
        seconds = min(seconds, predict_decode(shape, plan, device).seconds)
    return seconds / floor_seconds(shape, device)


@lru_cache(maxsize=4096)
def choose(shape: Shape, device: Device, steps: int, deterministic: bool = False) -> DecodePlan | None:
    """Which path runs a chain.

    Args:
        shape: The chain, and the tokens of a call.
        device: The GPU.
        steps: Steps of a Gram block.
        deterministic: Whether the same bits are wanted every time. Decode adds in the order in which its CTAs come.

    Returns:
        The plan of `plan_decode` where that path should be the faster one; else None: prefill.
    """
    plan = None if deterministic else plan_decode(shape, device)
    if plan is None:
        return None
    prefill = predict_prefill(shape, steps * shape.rank, device)
    return plan if predict_decode(shape, plan, device).seconds <= prefill.seconds else None
