"""Stage `machine`: what the device is, and the rates that the other stages are judged by."""

import subprocess
from contextlib import suppress
from typing import Any

import torch

from dlr_lock.microbench.timing import Runner, measured_rates
from dlr_lock.triton_kernels.gpu import device_constants

from .rows import FactRow
from .stage import Record

_NODES = 200  # of the CUDA graph that tells what a node costs
_ASKED = ("memory.total", "power.limit", "clocks.max.sm", "clocks.max.mem")  # of nvidia-smi


def measure(record: Record) -> None:
    """Facts and rates, a row each."""
    device = record.device
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    rates = measured_rates(device, dtype)
    facts: list[tuple[Any, ...]] = [
        ("copy, read and written", rates.copy / 1e9, "GB/s"),
        (f"product in {str(dtype).removeprefix('torch.')}", rates.matmul / 1e12, "TFLOP/s"),
    ]
    probed: list[FactRow] = []
    if gpu:
        from . import probes  # of Triton, which is for Linux alone

        assumed = device_constants(device.index)
        facts = [(*facts[0], 1e-9 * assumed.bandwidth), (*facts[1], 1e-12 * assumed.flops)]
        if assumed.cooperative:
            probed = probes.facts(device, assumed)
        properties = torch.cuda.get_device_properties(device)
        facts += [
            ("multiprocessors", properties.multi_processor_count),
            ("compute capability", f"{properties.major}.{properties.minor}"),
            ("L2 cache", getattr(properties, "L2_cache_size", 0) / 1e6, "MB"),
            ("CUDA or HIP", torch.version.cuda or torch.version.hip),
            ("node of a CUDA graph", 1e6 * node_seconds(device), "us", 1e6 * assumed.launch),
        ]
    record.document["rows"] = []
    record.add(*(FactRow(*fact) for fact in [*facts, *_settings(gpu)]), *probed)


def node_seconds(device: torch.device) -> float:
    """Seconds of one of many dependent nodes of a graph, each a kernel that does next to nothing."""
    x = torch.zeros(1, device=device)
    runner = Runner(lambda _: x.add_(1.0), _NODES, device, graph=True)
    return min(runner.sample() for _ in range(5))


def _settings(gpu: bool) -> list[tuple[str, str]]:
    if not gpu:
        return []
    ask = ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True).stdout
        values = [value.strip() for value in answer.splitlines()[0].split(",")]
        return list(zip((f"nvidia-smi {name}" for name in _ASKED), values, strict=True))
    return []
