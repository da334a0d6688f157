"""GPUs that need not be here for a plan, by their data sheets. Imports no torch: help names them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU by its data sheet: FLOPs a second of 16-bit and of float32 products (no TF32), and bytes of memory."""

    name: str
    half: float
    single: float
    memory: float
    bandwidth: float


GPUS = {
    "h100": Gpu("NVIDIA H100", 989e12, 67e12, 80e9, 3.35e12),
    "h200": Gpu("NVIDIA H200", 989e12, 67e12, 141e9, 4.8e12),
    "b200": Gpu("NVIDIA B200", 2250e12, 75e12, 180e9, 8e12),
    "a100": Gpu("NVIDIA A100", 312e12, 19.5e12, 80e9, 2.0e12),
    "l40s": Gpu("NVIDIA L40S", 362e12, 91.6e12, 48e9, 0.86e12),
    "rtx4090": Gpu("NVIDIA RTX 4090", 165e12, 82.6e12, 24e9, 1.0e12),
    "mi300x": Gpu("AMD MI300X", 1307e12, 163.4e12, 192e9, 5.3e12),
}
NAMES = ", ".join(GPUS)
