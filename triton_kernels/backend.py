"""Which form of the chain runs: chosen by DLR_LOCK_BACKEND, or for a while by `backend(...)`.

auto        the fused kernels on a CUDA or ROCm device; on a CPU one function in C++ for few tokens, where there is a
            compiler for it; plain torch for the rest; inference only
triton      the fused kernels, an error where they cannot run
native      the function in C++, an error where it cannot run; inference only
plain       plain torch, step by step; inference only
lookahead   plain torch, in rounds; inference only
naive       the definition, step by step: what is trained
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("auto", "triton", "native", "plain", "lookahead", "naive")
VARIABLE = "DLR_LOCK_BACKEND"

_chosen: list[list[str]] = []  # the open `backend` blocks, in the order in which they were entered


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs chains by another backend within a `with` block, in all threads.

    A compiled or captured graph keeps the backend that it was made with.

    Args:
        name: One of BACKENDS.

    Raises:
        ValueError: `name` is no backend.
    """
    entry = [_known(name, "backend")]
    _chosen.append(entry)
    try:
        yield
    finally:
        # This very entry: blocks of two threads may end in another order than they began.
        _chosen[:] = [other for other in _chosen if other is not entry]


def current_backend() -> str:
    """The innermost `backend` block's, else $DLR_LOCK_BACKEND, else 'auto'.

    Raises:
        ValueError: $DLR_LOCK_BACKEND is no backend.
    """
    return _chosen[-1][0] if _chosen else _known(os.environ.get(VARIABLE) or "auto", VARIABLE)


def _known(name: str, where: str) -> str:
    if (known := name.strip().lower()) not in BACKENDS:
        raise ValueError(f"{where} {name!r} is unknown; one of {', '.join(BACKENDS)}")
    return known
