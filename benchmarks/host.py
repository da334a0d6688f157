"""What launching costs the host, without a GPU: python -m benchmarks.host

Kernels are compiled for an H100, and launched by a driver that does nothing: what is left is Python's part. Calls of
functions are counted, which no busy machine changes; the time beside them is this machine's. Prints JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from dlr_lock.triton_kernels import ChainWeights, gram_blocks
from dlr_lock.triton_kernels.cost import H200
from dlr_lock.triton_kernels.decode import DecodePlan, decode, workspace
from dlr_lock.triton_kernels.launch import Launch
from dlr_lock.triton_kernels.prefill import prefill

CHAIN = (1, 12, 192, 576)  # lanes, steps, rank, features: the default in the place of an MLP of 576 x 1536
TOKENS = 512
ROUNDS = 200


class Counted(NamedTuple):
    """Of one call: functions called, of Python and of C; microseconds, the least of some rounds."""

    calls: int
    us: float


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


def counted(call: Callable[[], object]) -> Counted:
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
    return Counted(seen[0], round(1e6 * min(times), 1))


def measure() -> dict[str, Any]:
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
    prefill(x, chain, gram, H200)
    Launch.__call__ = original  # type: ignore[method-assign]
    launch, (grid, *arguments) = launched[0]
    whole = counted(lambda: prefill(x, chain, gram, H200))
    plan = DecodePlan.choose(
        lanes=1, depth=CHAIN[1], rank=CHAIN[2], hidden=CHAIN[3], tokens=1, sms=H200.sms, block_steps=2
    )
    memory = workspace(plan, "cpu")
    decoding = counted(lambda: decode(x[:1], chain, gram, plan=plan, workspace=memory))
    return {
        "decode": decoding._asdict(),
        "chain": CHAIN, "tokens": TOKENS, "launches": len(launched),
        "launch": counted(lambda: launch(grid, *arguments))._asdict(),
        "launch_by_triton": counted(
            lambda: launch.kernel[grid](*arguments, **launch.constants, **launch.options)
        )._asdict(),
        "prefill": whole._asdict(), "prefill_calls_a_launch": round(whole.calls / len(launched), 1),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
