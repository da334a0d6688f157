"""What a kernel launch compiles to on GPUs that are not here: registers, spills, shared memory, matrix units.

`launch_requests` turns a call of launchers, on meta tensors, into requests: the very arguments, block sizes
and options that they pass, specialized as Triton's JIT would. `compile_requests` compiles requests in a
process of its own, where the kernels are not interpreted. That process is this file: it takes a JSON list of
requests on stdin and prints the list of their resources. A request is

    {"kernel": "module:function", "target": "sm_90", "signature": {argument: type or "constexpr"},
     "constexprs": {argument: value, or {"activation": name} for one as `triton_form` gives it},
     "divisible": [arguments that are multiples of 16], "options": {...}}

and its resources are those of `resources`, or {"error": ...}.
"""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch

from dlr_lock.triton_kernels.activations import KERNEL_ACTS, triton_form

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}
MATRIX_UNITS = r"wgmma\.mma_async|tcgen05\.mma|(?<!wg)mma\.sync|v_mfma"
AMD_COUNTS = {
    "registers": (".vgpr_count",),  # vector registers of a lane, both files together
    "local": (".vgpr_spill_count", ".sgpr_spill_count"),
    "stack": (".private_segment_fixed_size",),
    "shared": (".group_segment_fixed_size",),
}


def launch_request(kernel: str, target: str, call: Callable[[], object]) -> dict[str, Any]:
    """The request for the one launch of `kernel`, "module:function", that `call()` makes through its module."""
    (request,) = launch_requests(kernel, target, call)
    return request


def launch_requests(kernel: str, target: str, call: Callable[[], object]) -> list[dict[str, Any]]:
    """The requests for all launches of `kernel`, "module:function", that `call()` makes through its module."""
    module, name = kernel.split(":")
    home = importlib.import_module(module)
    function = getattr(home, name)
    launches = []

    class Recorder:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **kwargs: launches.append((args, kwargs))

    with mock.patch.object(home, name, Recorder()):
        call()
    return [_request(kernel, function, target, args, kwargs) for args, kwargs in launches]


def _request(kernel: str, function: Any, target: str, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The request for a launch of `kernel`, which is that function, with these arguments."""
    parameters = inspect.signature(function.fn).parameters
    varying = function.do_not_specialize
    values = {k: p.default for k, p in parameters.items()} | dict(zip(parameters, args, strict=False))
    values |= {k: v for k, v in kwargs.items() if k in parameters}
    options = {k: v for k, v in kwargs.items() if k not in parameters}
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    divisible: list[str] = []
    for argument, parameter in parameters.items():
        value = values[argument]
        constant = "constexpr" in str(parameter.annotation)
        if isinstance(value, torch.Tensor):
            signature[argument] = "*" + TYPES[value.dtype]
            divisible.append(argument)  # the allocator of torch aligns to 512 bytes
        elif constant or value is None or (value == 1 and argument not in varying):
            # as Triton's JIT does with None and 1
            signature[argument] = "constexpr"
            names = [act for act in KERNEL_ACTS if value is triton_form(act)]
            constexprs[argument] = {"activation": names[0]} if names else value
        elif isinstance(value, int):
            signature[argument] = "i32" if abs(value) < 2**31 else "i64"
            divisible += [argument] * (value % 16 == 0 and argument not in varying)
        else:
            signature[argument] = "fp32"
    return {
        "kernel": kernel,
        "target": target,
        "signature": signature,
        "constexprs": constexprs,
        "divisible": divisible,
        "options": options,
    }


def compile_requests(requests: list[dict[str, Any]], processes: int = 2) -> list[dict[str, Any]]:
    """Resources of every request, in order. A kernel that does not compile gives {"error": traceback}."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, __file__, str(processes)],
        input=json.dumps(requests),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


def resources(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles one request.

    registers: of a thread. local, stack, shared: bytes (local on AMD: spilled registers). matrix: the
    names of the matrix instructions in the assembly. seconds: to compile, near 0 from Triton's cache.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    module, name = request["kernel"].split(":")
    arch = request["target"]
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx9") else GPUTarget("cuda", int(arch[3:]), 32)
    function = getattr(importlib.import_module(module), name)
    constexprs = {
        argument: triton_form(value["activation"]) if isinstance(value, dict) else value
        for argument, value in request["constexprs"].items()
    }
    marks = make_backend(target).parse_attr("DS")  # divisible; for AMD's pointers, also: within 2 GB
    attrs = {}
    for argument in request["divisible"]:
        pointer = request["signature"][argument].startswith("*")
        attrs[(function.arg_names.index(argument),)] = marks if pointer else marks[:1]
    source = ASTSource(function, request["signature"], constexprs, attrs)
    start = time.perf_counter()
    kernel = triton.compile(source, target=target, options=request["options"])
    seconds = time.perf_counter() - start
    nvidia = target.backend == "cuda"
    found = cubin_resources(kernel.asm["cubin"]) if nvidia else asm_resources(kernel.asm["amdgcn"])
    found["shared"] = max(found["shared"], kernel.metadata.shared)
    assembly = kernel.asm["ptx" if nvidia else "amdgcn"]
    matrix = sorted(set(re.findall(MATRIX_UNITS, assembly)))
    return found | {"matrix": matrix, "seconds": round(seconds, 2)}


def cubin_resources(cubin: bytes) -> dict[str, int]:
    """registers, stack, local and static shared bytes of a cubin of one kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text))
    names = {"registers": "REG", "stack": "STACK", "local": "LOCAL", "shared": "SHARED"}
    return {ours: int(found[theirs]) for ours, theirs in names.items()}


def asm_resources(assembly: str) -> dict[str, int]:
    """The same from the metadata at the end of an AMD assembly file."""
    counts = {k: int(v) for k, v in re.findall(r"^\s+(?:- )?(\.\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    return {ours: sum(counts[name] for name in theirs) for ours, theirs in AMD_COUNTS.items()}


def resources_or_error(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return resources(request)
    except Exception:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    for kernel in {request["kernel"] for request in wanted}:
        importlib.import_module(kernel.split(":")[0])  # once, before the workers are forked
    with ProcessPoolExecutor(int(sys.argv[1]), mp_context=get_context("fork")) as pool:
        print(json.dumps(list(pool.map(resources_or_error, wanted))))
