"""What the cost model knows of a GPU: rates and latencies, each with its source."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU's constants. Rates are what a long copy and a large product reach, not the data sheet's.

    What has no other source was measured on an H100 by danila-permogorskii/kernel-task (`results/h100/floors.json`).
    `make gpu FLAGS="--stage machine"` measures all but `latency`, `units`, `mma`, `sync` and `step`.
    """

    name: str
    sms: int  # multiprocessors
    bandwidth: float  # bytes a second, device memory
    flops: float  # of 16-bit products, a second
    l2: float = 50e6  # bytes of L2 cache
    # Bytes a second into one multiprocessor, from L2 or through it, while all others read too. One block alone gets
    # 48 KB in 0.92 us, 53e9; 132 at once share the 5.7 TB/s or so that an H100's L2 gives, 43e9.
    sm_bandwidth: float = 48e9
    # Bytes a second of float32 additions to the same places in L2, of all multiprocessors: an estimate, from one
    # addition of 16 bytes a clock in each of 80 slices or so.
    atomics: float = 2e12
    launch: float = 1.0e-6  # seconds a node of a CUDA graph: 0.8 to 1.3 (MegaQwen, HazyResearch)
    barrier: float = (
        1.0e-6  # seconds from the last arrival of all multiprocessors to their going on: see `wait`
    )
    latency: float = (
        0.3e-6  # seconds of a load or an addition out to memory: 414 to 479 cycles (arXiv 2402.13499)
    )
    # Elements of the weights that a multiprocessor multiplies and adds a second without matrix units: 128 a clock of
    # 1.75 GHz, in three instructions: an estimate.
    units: float = 75e9
    sync: float = 25e-9  # seconds that warps wait for one another: an estimate
    mma: float = (
        17e-9  # seconds of a product of 16 by 8 by 16 that another one waits for: 0.8 us for 48 of them
    )
    step: float = 0.35e-6  # seconds a step of prefill's solve, one after another: an estimate
    cooperative: bool = True  # whether a persistent grid can be launched
    # Whether a product may have tiles of 128 by 256: on sm_80 they spill 48 bytes, on gfx942 want 98 KB of 64.
    wide_tiles: bool = True
    # Whether the compiler is told how many registers a product may take: for sm_100 it spills 8 to 32 bytes unasked,
    # with 64 to 80 taken. Elsewhere it does not, and AMD's cannot be told.
    registers: bool = False

    def wait(self, ctas: float) -> float:
        """Seconds of a barrier among some CTAs: 132 took 1.00 us and 264 took 1.38, a line from 0.62 on."""
        return self.barrier * (0.62 + 0.38 * ctas / self.sms)


# Copies at 4.3 TB/s and products of 8192 at 785 TFLOP/s were measured on an H200; the others are data sheets
# times the same shares (0.9 and 0.79). The caches are data sheets'.
_KNOWN = {
    "H200": (4.3e12, 785e12, 50e6),
    "H100": (3.0e12, 785e12, 50e6),
    "B200": (7.2e12, 1780e12, 126e6),
    "A100": (1.8e12, 246e12, 40e6),
    "MI300X": (4.8e12, 1030e12, 256e6),
}
H200 = Device("NVIDIA H200", 132, *_KNOWN["H200"])


@cache
def device_constants(index: int) -> Device:
    """The constants of the CUDA or ROCm device `index`; one that is not known is taken for an H200 of its size."""
    properties = torch.cuda.get_device_properties(index)
    sms = properties.multi_processor_count
    rates = next((r for key, r in _KNOWN.items() if key in properties.name), None)
    if rates is None:
        share = sms / H200.sms
        rates = (H200.bandwidth * share, H200.flops * share, H200.l2 * share)
    # Before compute capability 8 `tl.dot` has no matrix units for these tiles: 670 bytes of stack on sm_75.
    major = properties.major if torch.version.hip is None else 0
    return Device(
        properties.name, sms, *rates, cooperative=major >= 8, wide_tiles=major >= 9, registers=major >= 10
    )
