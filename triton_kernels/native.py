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

MOST_TOKENS = 64  # of a call; torch's products are the faster ones from 128 on, of wide MLPs from 64 on
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi")
_VECTORS = {  # by what torch runs on this processor
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
_PAIRS = "-mavx512bf16"
_DTYPES = (torch.float32, torch.bfloat16)


def native_reason(x: Tensor, chain: ChainWeights) -> str | None:
    """Why the function cannot run a chain on x, as the end of a sentence; None where it can."""
    _, _, rank, hidden = chain.A.shape
    if reason := chain.refused(x, "a CPU", x.device.type == "cpu", NATIVE_ACTS, _DTYPES):
        return reason
    if hidden % 16 or rank % 16:
        return f"wants features and a rank in multiples of 16, not {hidden} and {rank}"
    if not (chain.A.is_contiguous() and chain.B.is_contiguous()):
        return "wants contiguous weights"
    return library(chain.act)[1]


def run_native(x: Tensor, chain: ChainWeights) -> Tensor:
    """`chain_reference` for tokens and a chain that were checked and for which `native_reason` gives None."""
    function, _ = library(chain.act)
    A, B, (lanes, depth, rank, hidden) = chain.A, chain.B, chain.A.shape
    scale, bias = (v.to(torch.float32).contiguous() for v in (chain.scale, chain.bias))
    start = x.contiguous() if x.dtype in _DTYPES else x.to(torch.float32).contiguous()
    y = torch.empty_like(start)
    tokens, row = x.numel() // hidden, hidden * start.itemsize
    for first in range(0, tokens, MOST_TOKENS):
        failed = function(
            start.data_ptr() + first * row, A.data_ptr(), B.data_ptr(), scale.data_ptr(), bias.data_ptr(),
            y.data_ptr() + first * row, lanes, depth, rank, hidden, min(MOST_TOKENS, tokens - first),
            start.dtype == torch.bfloat16, A.dtype == torch.bfloat16, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for {tokens} tokens of {hidden} features")
    return y.to(x.dtype)


@cache
def library(act: str) -> tuple[Any, str | None]:
    """The function for an activation, one of NATIVE_ACTS, compiled where it is not in the cache; else None, and why.

    A compiler that fails is warned of; a machine that has none is an ordinary one.
    """
    if not sys.platform.startswith("linux"):
        return None, "is made for Linux alone"
    compiler = shutil.which(os.environ.get("CXX") or "g++")  # clang calls an OpenMP that is not torch's
    if compiler is None:
        return None, "needs a C++ compiler: g++, or what CXX names"
    source = Path(__file__).with_suffix(".cpp")
    compile_ = [compiler, *_FLAGS, *vector_flags(), f"-DACTIVATE={NATIVE_ACTS[act]}", "-c", str(source)]
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


def vector_flags() -> tuple[str, ...]:
    """What tells the compiler which instructions this processor has, none on one that is not known."""
    flags = _VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())
    pairs = "-mavx512f" in flags and torch.cpu._is_avx512_bf16_supported()
    return (*flags, _PAIRS) if pairs else flags


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
    function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 5 + [ctypes.c_int] * 3
    return function
