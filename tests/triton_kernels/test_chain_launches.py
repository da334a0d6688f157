"""The launches of default chains on GPUs that are not here: they compile, spill nothing, and fit beside one another.

A sample; all of them, in half an hour: pytest tests/triton_kernels/every_launch.py
"""

import pytest
from aot import compile_requests
from chain_launches import DEVICES, chain_requests, complaints, distinct

SAMPLE = [((2048, 8192), 1), ((2048, 8192), 16), ((2048, 8192), 4096), ((4096, 14336), 512)]


@pytest.mark.parametrize("target", DEVICES)
def test_a_sample_compiles_without_spills(target: str) -> None:
    requests = distinct([request for case in SAMPLE for request in chain_requests(target, *case)])
    found = compile_requests(requests)
    wrong = [line for pair in zip(requests, found, strict=True) for line in complaints(*pair)]
    assert not wrong, "\n".join(wrong)
    assert len(requests) > 8 and {request["kernel"].split(":")[1] for request in requests} >= {
        "matmul_kernel"
    }
