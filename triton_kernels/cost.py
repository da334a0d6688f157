"""What a DLR-Net should cost: counted bytes, FLOPs and dependent steps, times a device's constants.

The same counts give the floor (what no implementation can beat), the prediction for each path, and so the choice
between them. Constants without a measurement of ours name their source; `dlr-lock bench --explain` prints all.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from math import ceil

import torch
from torch import Tensor

from .decode_plan import DecodePlan
from .lookahead import BLOCK, block_steps

MAX_DECODE_TOKENS = 64
SOLVE_WIDTH = 512  # columns of one solve: the most whose steps stay in registers
SOLVE_STEPS = 16  # steps of one solve, which is unrolled: 120 small products
_GRAM_SHARE = 1 / 8  # of the weights' memory, which Gram blocks wider than one solve may take
USUAL_TOKENS = 4096  # of a prefill, which the width of Gram blocks is chosen for


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU's constants. Rates are what a long copy and a large product reach, not the data sheet's."""

    name: str
    sms: int  # multiprocessors
    bandwidth: float  # bytes a second, device memory
    flops: float  # of 16-bit products, a second
    sm_bandwidth: float = (
        107e9  # bytes a second into one multiprocessor from L2: H100, kernel-task floors.json
    )
    launch: float = 1.0e-6  # seconds a node of a CUDA graph: 0.8 to 1.3 (MegaQwen, HazyResearch)
    atomics: float = 2e12  # bytes a second of float32 additions in L2: an estimate, not measured yet
    barrier: float = 1.0e-6  # seconds, all multiprocessors: H100, kernel-task floors.json
    step: float = 0.35e-6  # seconds a step of a solve, one after another: an estimate, not measured yet
    cooperative: bool = True  # whether a persistent grid can be launched


# Copies at 4.3 TB/s and products of 8192 at 785 TFLOP/s were measured on an H200; the others are data sheets
# times the same shares (0.9 and 0.79).
_KNOWN = {
    "H200": (4.3e12, 785e12),
    "H100": (3.0e12, 785e12),
    "B200": (7.2e12, 1780e12),
    "A100": (1.8e12, 246e12),
    "MI300X": (4.8e12, 1030e12),
}
H200 = Device("NVIDIA H200", 132, *_KNOWN["H200"])


@cache
def device_constants(index: int) -> Device:
    """The constants of the CUDA or ROCm device `index`; one that is not known is taken for an H200 of its size."""
    properties = torch.cuda.get_device_properties(index)
    sms = properties.multi_processor_count
    rates = next((r for key, r in _KNOWN.items() if key in properties.name), None)
    if rates is None:
        rates = (H200.bandwidth * sms / H200.sms, H200.flops * sms / H200.sms)
    # Before compute capability 8 `tl.dot` has no matrix units for these tiles: 670 bytes of stack on sm_75.
    cooperative = torch.version.hip is None and properties.major >= 8
    return Device(properties.name, sms, *rates, cooperative=cooperative)


@dataclass(frozen=True, slots=True)
class Shape:
    """A DLR-Net on a number of tokens: A and B are [lanes, depth, rank, hidden] of `itemsize` bytes an element."""

    lanes: int
    depth: int  # steps a lane
    rank: int
    hidden: int
    tokens: int
    itemsize: int = 2

    @staticmethod
    def of(A: Tensor, tokens: int) -> "Shape":
        """The shape of a chain with weights like A [L, K, r, d]."""
        lanes, depth, rank, hidden = A.shape
        return Shape(lanes, depth, rank, hidden, tokens, A.itemsize)

    @property
    def weight_bytes(self) -> int:
        """Bytes of A and B."""
        return 2 * self.lanes * self.depth * self.rank * self.hidden * self.itemsize

    @property
    def flops(self) -> int:
        """FLOPs of the chain itself, two for a multiplication and addition."""
        return 2 * self.tokens * self.weight_bytes // self.itemsize

    def gram_bytes(self, width: int) -> int:
        """Bytes of Gram blocks of `width` columns, as `gram_blocks` makes them."""
        steps = block_steps(width, self.depth, self.rank)
        blocks = ceil(self.depth / steps)
        return 0 if steps == 1 else self.lanes * blocks * width**2 * self.itemsize


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
    """What the decode kernel should take: a round streams its weights while the one before it waits and solves."""
    floor = floor_seconds(shape, device)
    busy = min(1.0, plan.lanes * plan.slices / device.sms)
    stream = shape.weight_bytes / plan.rounds / (device.bandwidth * busy)
    # What every CTA reads from L2 for its solve: the Gram tiles and P; before that, P was added by all of them.
    grams = plan.steps * (plan.steps - 1) // 2 * plan.rank**2 * shape.itemsize
    p = 4 * shape.tokens * plan.steps * plan.rank
    adds = plan.lanes * plan.slices * p / device.atomics if plan.slices > 1 else 0.0
    barrier = device.barrier if plan.slices > 1 else 0.0
    # The Gram tiles are requested before the wait, P only after it.
    wait = (
        adds + max(barrier, grams / device.sm_bandwidth) + p / device.sm_bandwidth + plan.steps * device.step
    )
    # A slice of one tile has its weights requested before the wait; a wider one streams them after it.
    each = max(stream, wait) if plan.chunks == 1 else stream + wait
    return Prediction("decode", device.launch + plan.rounds * each, floor, 1, plan.rounds)


def predict_prefill(shape: Shape, width: int, device: Device) -> Prediction:
    """What prefill should take with Gram blocks of `width` columns: each launch at the rate of its bytes or FLOPs."""
    rounds = ceil(shape.depth / block_steps(width, shape.depth, shape.rank))
    part = solve_columns(width, shape.rank)
    parts = ceil(width / part)
    rows = shape.lanes * shape.tokens
    # u read and written, z written, x read: once a round but the last, where y is written instead
    state = (rounds - 1) * rows * shape.hidden * (8 + 2 * shape.itemsize)
    moved = shape.weight_bytes + state + 2 * shape.tokens * shape.hidden * shape.itemsize
    products = max(shape.flops / device.flops, moved / device.bandwidth)
    # Two products a round: there is nothing to solve, and P is never in memory.
    if width == shape.rank:
        written = 2 * rows * shape.depth * shape.rank * shape.itemsize / device.bandwidth
        seconds = 2 * rounds * device.launch + products + written
        return Prediction("prefill", seconds, floor_seconds(shape, device), 2 * rounds, rounds)
    # The solves: P written and read, H written and read; small products at a third of the rate; or their steps,
    # one after another, in programs of 64 tokens of which a multiprocessor holds two.
    columns = rows * shape.depth * shape.rank
    waves = ceil(ceil(shape.tokens / 64) * shape.lanes / (2 * device.sms))
    solves = max(
        columns * (8 + 2 * shape.itemsize) / device.bandwidth,
        columns * part / (device.flops / 3),
        waves * shape.depth * device.step,
    )
    # What the parts of a block add to the P of its later ones: 8 bytes an element read and written each time
    between = (parts - 1) / 2 * columns * max(2 * part / device.flops, 8 / device.bandwidth)
    # A part of one step has no solve: its product ends with the activation.
    launches = rounds * (parts + 1 if part == shape.rank else 2 * parts + 1)
    seconds = launches * device.launch + products + solves + between
    return Prediction("prefill", seconds, floor_seconds(shape, device), launches, rounds)


def predict_dense(shape: Shape, width: int, device: Device) -> Prediction:
    """What a gated MLP of `width` hidden units in the chain's place should take, in three launches."""
    elements = 3 * shape.hidden * width
    seconds = max(elements * shape.itemsize / device.bandwidth, 2 * shape.tokens * elements / device.flops)
    return Prediction("dense", 3 * device.launch + seconds, seconds, 3, 3)


def solve_columns(width: int, rank: int) -> int:
    """Columns of a block of `width` columns that one solve takes: whole steps, as many as its registers hold.

    A step of more than 128 columns is not solved with others: a solve has a program for 64 tokens, 8 for 512 where a
    device has 132 multiprocessors, and what one such step adds for the next is a product large enough to fill it.
    """
    if rank > 128:
        return rank
    most = min(SOLVE_WIDTH, SOLVE_STEPS * rank)
    return min(width, max(rank, most // rank * rank))


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

    Tried are whole solves, and solves of a power of two of steps, which decode's rounds divide in more ways; once
    to eight times. Blocks wider than one solve may take an eighth of the weights' bytes.

    Args:
        shape: The chain, with the number of tokens that counts beside one token.
        device: The GPU.

    Returns:
        The width at which the product of both predictions over their floors is the least.
    """
    lane = shape.depth * shape.rank
    part = solve_columns(lane, shape.rank)
    even = shape.rank << (part // shape.rank).bit_length() - 1
    widths = sorted({min(lane, size * n) for size in (part, even) for n in (1, 2, 4, 8)})
    fitting = [w for w in widths if w <= part or shape.gram_bytes(w) <= _GRAM_SHARE * shape.weight_bytes]
    usual = (replace(shape, tokens=1), shape)
    return min(fitting, key=lambda w: math.prod(_over_floor(s, w, device) for s in usual))


def _over_floor(shape: Shape, width: int, device: Device) -> float:
    """Predicted seconds of the faster path over the floor."""
    seconds = predict_prefill(shape, width, device).seconds
    if plan := decode_plan(shape, device, width // shape.rank):
        seconds = min(seconds, predict_decode(shape, plan, device).seconds)
    return seconds / floor_seconds(shape, device)


@cache
def decode_plan(shape: Shape, device: Device, steps: int, deterministic: bool = False) -> DecodePlan | None:
    """How the decode kernel runs a chain.

    Args:
        shape: The chain, and the tokens of a call.
        device: The GPU.
        steps: Steps of a Gram block.
        deterministic: Whether sums are taken in a fixed order.

    Returns:
        The plan; None where the kernel cannot run: on a device without cooperative launches, for more than
        MAX_DECODE_TOKENS tokens, or for a chain of more lanes or longer lanes than it holds.
    """
    if not device.cooperative or not 0 < shape.tokens <= MAX_DECODE_TOKENS or shape.lanes > device.sms:
        return None
    try:
        return DecodePlan.choose(
            lanes=shape.lanes,
            depth=shape.depth,
            rank=shape.rank,
            hidden=shape.hidden,
            tokens=shape.tokens,
            sms=device.sms,
            itemsize=shape.itemsize,
            block_steps=steps,
            deterministic=deterministic,
        )
    except ValueError:  # a lane beyond the kernel's 32-bit offsets
        return None


@cache
def choose(shape: Shape, device: Device, steps: int, deterministic: bool = False) -> DecodePlan | None:
    """The plan of `decode_plan`, with its arguments, where that path should be the faster one; else None: prefill."""
    plan = decode_plan(shape, device, steps, deterministic)
    if plan is None:
        return None
    prefill = predict_prefill(shape, steps * shape.rank, device)
    return plan if predict_decode(shape, plan, device).seconds <= prefill.seconds else None
