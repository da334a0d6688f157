"""Every launch of the default chains, compiled for every target: pytest tests/triton_kernels/every_launch.py

No test_*.py, for it takes half an hour; `test_chain_launches.py` holds a sample. To be run where a kernel, a plan or a
tile changes.
"""

import pytest
from aot import compile_requests
from chain_launches import DEVICES, MLPS, TOKENS, chain_requests, complaints, distinct


@pytest.mark.parametrize("target", DEVICES)
def test_compiles_without_spills(target: str) -> None:
    requests = distinct(
        [request for mlp in MLPS for tokens in TOKENS for request in chain_requests(target, mlp, tokens)]
    )
    found = compile_requests(requests)
    wrong = [line for pair in zip(requests, found, strict=True) for line in complaints(*pair)]
    assert not wrong, "\n".join(wrong)
