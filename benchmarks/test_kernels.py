"""The small set of `make bench`: one chain in the place of a small MLP, on the best device there is."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from dlr_lock.microbench.bench import chain_cases, cold_weights
from dlr_lock.microbench.slot import CPU_PROVIDERS, PROVIDERS, Slot, dtype_of
from dlr_lock.microbench.timing import Runner
from dlr_lock.runtime import best_device

DEVICE = best_device()
GPU = DEVICE.type == "cuda"


@pytest.fixture(scope="module", params=(1, 16, 512), ids="tokens={}".format)
def slot(request: pytest.FixtureRequest) -> Slot:
    (case,) = chain_cases(576, 1536, depth=36, tokens=[request.param])
    index = torch.cuda.current_device() if GPU else None
    device = torch.device(DEVICE.type, index)
    return Slot(case, device, dtype_of("auto", gpu=GPU), cold_weights(device))


@pytest.mark.parametrize("provider", PROVIDERS if GPU else CPU_PROVIDERS)
def test_mlp(benchmark: BenchmarkFixture, slot: Slot, provider: str) -> None:
    """A run of a provider: one call, or, of a CUDA graph, one on each copy of the weights."""
    with torch.no_grad():
        call = slot.call(provider)
        if call is None:
            pytest.skip("the cost model has no such path for this case")
        runner = Runner(*call, slot.device, graph=provider.endswith("-graph"))
        benchmark.extra_info["calls a run"] = runner.calls
        benchmark(runner.run)
