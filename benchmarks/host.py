"""What launching costs the host, without a GPU: python -m benchmarks.host [--out FOLDER] [--note WORDS]

Kernels are compiled for an H100, and launched by a driver that does nothing: what is left is Python's part. Calls of
functions are counted, which no busy machine changes; the time beside them is this machine's. Writes JSON.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from dlr_lock.common.machine import machine
from dlr_lock.triton_kernels import ChainWeights, gram_blocks
from dlr_lock.triton_kernels.decode import decode
from dlr_lock.triton_kernels.decode_plan import plan_decode
from dlr_lock.triton_kernels.gpu import H200
from dlr_lock.triton_kernels.launch import Launch
from dlr_lock.triton_kernels.prefill import prefill
from dlr_lock.triton_kernels.rounds import Shape

from .gpu.rows import HostRow
from .output import target, write_json

CHAIN = (1, 12, 192, 576)  # lanes, steps, rank, features: the default in the place of an MLP of 576 x 1536
TOKENS = 512
ROUNDS = 200


class _Utils:
    """Of a device with room for everything."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": H200.sms, "warpSize": 32}

    def load_binary(self, *binary: object) -> tuple[None, int, int, int, int]:
        return None, 0, 0, 0, 1024


class IdleDriver:
    """A driver of Triton's that compiles for compute capability 9.0, and launches nothing."""

    utils = _Utils()

    @staticmethod
    def launcher_cls(source: object, metadata: object) -> Callable[..., None]:
        return lambda *arguments: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def counted(what: str, launches: int, call: Callable[[], object]) -> HostRow:
    """What `call()` costs, once it has run."""
    call()
    seen = [0]

    def count(frame: object, event: str, argument: object) -> None:
        seen[0] += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return HostRow(what, launches, seen[0], round(1e6 * min(times), 1))


def measure() -> list[HostRow]:
    """A decode call; a prefill call, and one of its launches by `Launch` and by Triton's own launcher."""
    triton.runtime.driver.set_active(IdleDriver())
    A, B = (torch.zeros(CHAIN, dtype=torch.bfloat16) for _ in range(2))
    chain = ChainWeights(A, B, *(torch.zeros(CHAIN[-1]) for _ in range(2)))
    x = torch.zeros(TOKENS, CHAIN[-1], dtype=torch.bfloat16)
    gram = gram_blocks(A, B, block=2 * CHAIN[2])
    launched: list[tuple[Launch, tuple[Any, ...]]] = []
    original = Launch.__call__

    def kept(self: Launch, *arguments: Any) -> None:
        launched.append((self, arguments))
        original(self, *arguments)

    prefill(x, chain, gram, H200)  # compiles
    Launch.__call__ = kept  # type: ignore[method-assign]
    try:
        prefill(x, chain, gram, H200)
    finally:
        Launch.__call__ = original  # type: ignore[method-assign]
    launch, (grid, *arguments) = launched[0]
    plan = plan_decode(Shape.of(A, 1), H200)
    assert plan is not None
    token = x[:1]
    return [
        counted("decode", 1, lambda: decode(token, chain, plan)),
        counted("prefill", len(launched), lambda: prefill(x, chain, gram, H200)),
        counted("launch", 1, lambda: launch(grid, *arguments)),
        counted(
            "launch by Triton",
            1,
            lambda: launch.kernel[grid](*arguments, **launch.constants, **launch.options),
        ),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measures, and writes a file among the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host")
    parser.add_argument(
        "--out", type=Path, help="folder of the file, instead of the processor's under results"
    )
    parser.add_argument("--note", help="what a reader should know of the machine")
    options = parser.parse_args(arguments)
    document = {"schema": 1, **machine(torch.device("cpu")), "stopped": None, "note": options.note}
    document |= {"chain": CHAIN, "tokens": TOKENS, "rows": [asdict(row) for row in measure()]}
    path = target(document, "host", options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
