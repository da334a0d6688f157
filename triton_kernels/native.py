"""A chain of plain steps for few tokens on a CPU, in one call of a function in C++ (native.cpp).

torch's products of so few tokens cost more in overhead than in work: 24 of them take 1.2 times an MLP's three in
float32, and 1.9 times in bfloat16. The function reads each weight once, at an MLP's pace or better.

It is compiled when the first model is loaded on a machine, in a second or two, as Triton compiles what launches its
kernels, and kept in the cache folder. Where that cannot be, chains run in plain torch.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.cache import cache_folder
from .activations import NATIVE_ACTS
from .chain import ChainWeights
from .reference import chain_output

MOST_TOKENS = 16  # of a call; torch's products are the faster ones from 32 on
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi")
_VECTORS = {  # by what torch runs on this processor
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}


def native_reason(x: Tensor, chain: ChainWeights) -> str | None:
    """Why the function cannot run a chain on x, as the end of a sentence; None where it can."""
    _, _, rank, hidden = chain.A.shape
    cpu, dtypes = x.device.type == "cpu", (torch.float32, torch.bfloat16)
    if reason := chain.refused(x, "a CPU", cpu, NATIVE_ACTS, dtypes):
        return reason
    if hidden % 16 or rank % 16:
        return f"wants features and a rank in multiples of 16, not {hidden} and {rank}"
    if not (chain.A.is_contiguous() and chain.B.is_contiguous()):
        return "wants contiguous weights"
    return library(chain.act)[1]


def run_native(x: Tensor, chain: ChainWeights) -> Tensor:
    """`chain_reference` for tokens and a chain that were checked and for which `native_reason` gives None."""
    function, _ = library(chain.act)
    lanes, depth, rank, hidden = chain.A.shape
    start = x.reshape(-1, hidden).to(torch.float32).contiguous()
    update = torch.empty_like(start)
    threads = torch.get_num_threads()
    for first in range(0, len(start), MOST_TOKENS):
        part, out = start[first : first + MOST_TOKENS], update[first : first + MOST_TOKENS]
        failed = function(
            part.data_ptr(), chain.A.data_ptr(), chain.B.data_ptr(), out.data_ptr(),
            lanes, depth, rank, hidden, len(part), chain.A.itemsize, threads,
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for {len(part)} tokens of {hidden} features in {threads} threads")
    return chain_output(x, chain, update)


@cache
def library(act: str) -> tuple[Any, str | None]:
    """The function for an activation, one of NATIVE_ACTS, compiled where it is not in the cache; else None, and why.

    A compiler that fails is warned of; a machine that has none is an ordinary one.
    """
    if not sys.platform.startswith("linux"):
        return None, "is made for Linux alone"
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    if compiler is None:
        return None, "needs a C++ compiler: g++, clang++, or what CXX names"
    source = Path(__file__).with_suffix(".cpp")
    vectors = _VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())
    compile_ = [compiler, *_FLAGS, *vectors, f"-DACTIVATE={NATIVE_ACTS[act]}", "-c", str(source)]
    try:
        key = hashlib.sha256(source.read_bytes() + repr((compile_, torch.__version__)).encode()).hexdigest()[
            :16
        ]
        return _load(compile_, f"chain-{key}.so"), None
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        first = next((line for line in said if "error" in line), said[0] if said else type(error).__name__)
        reason = f"could not be built: {first}"
        warnings.warn(
            f"the native operator {reason}; chains run in plain torch, which is slower", stacklevel=2
        )
        return None, reason


def _load(compile_: list[str], name: str) -> Any:
    """The function of the library of that name in the cache, compiled if need be; whole, whoever else compiles it."""
    kept = cache_folder() / "native" / name
    with tempfile.TemporaryDirectory() as work:
        path = kept
        if not kept.is_file():
            path = Path(work) / name
            # Linked without OpenMP: its symbols are found in what torch has loaded, and so the threads are torch's.
            torch_libraries = f"-L{Path(torch.__file__).parent / 'lib'}"
            link = [compile_[0], "-shared", f"{path}.o", torch_libraries, "-Wl,--no-as-needed", "-ltorch_cpu"]
            for command in ([*compile_, "-o", f"{path}.o"], [*link, "-o", str(path)]):
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            with suppress(OSError):  # of a home that cannot be written: then every process compiles
                kept.parent.mkdir(parents=True, exist_ok=True)
                beside = kept.with_suffix(f".{os.getpid()}")
                shutil.copyfile(path, beside)
                beside.replace(kept)
        function = ctypes.CDLL(str(path)).dlr_chain
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 5 + [ctypes.c_int] * 2
    return function
