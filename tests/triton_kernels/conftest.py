"""Where kernels run: on the GPU if there is one, else in Triton's interpreter.

The interpreter is chosen when triton is imported, so it runs in a process of its own.
"""

import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest import mock

import pytest
import torch

Execute = Callable[..., Any]


@pytest.fixture(scope="session")
def execute() -> Iterator[Execute]:
    """execute(function, *arguments): the function's result, from where kernels run."""
    if torch.cuda.is_available():
        yield lambda function, *arguments: function(*arguments)
        return
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(os.getpid).result()  # starts the process, with this environment
    with pool:
        # pickled here: the pool's own pickler would pass tensors through shared memory
        yield lambda *call: pickle.loads(pool.submit(_unpickled_call, pickle.dumps(call)).result())


def _unpickled_call(call: bytes) -> bytes:
    function, *arguments = pickle.loads(call)
    return pickle.dumps(function(*arguments))
