"""What default chains launch on GPUs that are not here, to be compiled for them: see `aot.py`."""

from functools import partial
from typing import Any

import torch
from aot import launch_requests

from dlr_lock.runtime.spec import DLRSpec
from dlr_lock.triton_kernels import ChainWeights, cost
from dlr_lock.triton_kernels.decode import _launch, decode
from dlr_lock.triton_kernels.gpu import _KNOWN, H200, Device
from dlr_lock.triton_kernels.prefill import Prefill
from dlr_lock.triton_kernels.rounds import Shape, class_tokens

# Of models of 135M to 70B parameters.
MLPS = [(576, 1536), (1024, 3072), (1536, 8960), (2048, 8192), (2560, 9728), (3072, 8192), (4096, 14336),
        (5120, 25600), (8192, 28672)]  # fmt: skip
TOKENS = (1, 16, 17, 64, 128, 512, 4096)
DEVICES = {
    "sm_80": Device("NVIDIA A100", 108, *_KNOWN["A100"], wide_tiles=False),
    "sm_90": H200,
    "sm_100": Device("NVIDIA B200", 148, *_KNOWN["B200"], registers=True),
    "gfx942": Device("AMD MI300X", 304, *_KNOWN["MI300X"], cooperative=False, wide_tiles=False),
}
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB a program
# KiB of shared memory and threads a multiprocessor; 64 Ki registers there are in each
ROOM = {"sm_80": (164, 2048), "sm_90": (228, 2048), "sm_100": (228, 2048)}
_DECODE, _MATMUL = "dlr_lock.triton_kernels.decode:", "dlr_lock.triton_kernels.matmul:matmul_kernel"


def chain_requests(target: str, mlp: tuple[int, int], tokens: int) -> list[dict[str, Any]]:
    """The launches of the default chain in an MLP's place, bfloat16, by the path that is chosen for the device."""
    device, spec = DEVICES[target], DLRSpec.matching(*mlp, mlp_gated=True)
    shape = Shape(*spec.weight_shape, tokens)
    steps = cost.best_width(shape, device) // shape.rank
    weights = torch.empty(spec.weight_shape, dtype=torch.bfloat16, device="meta")
    vector = torch.empty(spec.hidden_size, device="meta")
    chain = ChainWeights(weights, weights, vector, vector)
    x = torch.empty(tokens, spec.hidden_size, dtype=torch.bfloat16, device="meta")
    plan = cost.choose(shape, device, steps)
    if plan is None:
        shape = Shape(*spec.weight_shape, class_tokens(tokens))

        def call() -> None:  # made within: a launch keeps the kernel that it found
            Prefill(shape, steps, torch.bfloat16, "silu", device)(x, chain, weights)

        return launch_requests(_MATMUL, target, call)
    name = "one_token_kernel" if plan.tokens == 1 else "tokens_kernel"
    _launch.cache_clear()  # of launches of the kernel itself, which is replaced while it is recorded
    try:
        return launch_requests(_DECODE + name, target, partial(decode, x, chain, plan))
    finally:
        _launch.cache_clear()


def kind(request: dict[str, Any]) -> str:
    """What launches have in common that compile to the same but for sizes: those of products are steps in memory, and
    how often a loop turns."""
    c = dict(request["constexprs"])
    if request["kernel"] == _MATMUL:
        c["MASKED"] = (c["N"] % c["BN"] > 0, c["K"] % (c["BK"] * c["SPLIT"]) > 0)
        c["LONG"] = c["K"] > 3 * c["BK"] * c["SPLIT"]  # than the pipeline
        c["ACTIVE"] = (c["ACTIVE"] > 0) + (c["ACTIVE"] == c["N"])
        c |= {name: min(c[name], 2) for name in ("SPLIT", "Z_ROW", "W_COLUMN")}
        sizes = ("_START", "_LANE", "_BLOCK", "A_ROW", "W_ROW", "O_ROW")
        c = {name: value for name, value in c.items() if name not in ("N", "K") and not name.endswith(sizes)}
    return repr(
        (request["target"], request["kernel"], sorted(request["options"].items()), sorted(c.items(), key=str))
    )


def distinct(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One of each kind."""
    return list({kind(request): request for request in reversed(requests)}.values())[::-1]


def programs_at_once(request: dict[str, Any], found: dict[str, Any]) -> int:
    """Programs that a multiprocessor of an NVIDIA GPU holds at once, by registers, shared memory and threads."""
    shared, most = ROOM[request["target"]]
    threads = 32 * request["options"]["num_warps"]
    registers = -(-found["registers"] // 8) * 8 * threads
    # a KiB of a program's shared memory is the system's
    return min(65536 // registers, shared * 1024 // (found["shared"] + 1024), most // threads)


def complaints(request: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What is wrong with what a launch compiled to."""
    if "error" in found:
        return [found["error"]]
    target, c = request["target"], request["constexprs"]
    product = request["kernel"] == _MATMUL
    wrong = []
    allowed = (
        8 if target == "sm_80" and (c.get("BM"), c.get("TILES")) == (64, 4) else 0
    )  # decode_plan.py: HELD
    if found["stack"] + found["local"] > allowed:
        wrong.append(f"spills {found['stack'] + found['local']}")
    if found["shared"] > SHARED[target] * 1024:
        wrong.append(f"{found['shared']} bytes of shared memory")
    if bool(found["matrix"]) == request["kernel"].endswith("one_token_kernel"):
        wrong.append(f"matrix units: {found['matrix']}")
    # The widest tiles have a multiprocessor to themselves, as decode has; of split sums there is rarely a second.
    narrow = product and c["BM"] * c["BN"] < 128 * 128 and c["SPLIT"] == 1
    if target in ROOM and narrow and programs_at_once(request, found) < 2:
        wrong.append("one program a multiprocessor")
    return [f"{what}: {found} of {kind(request)}" for what in wrong]
