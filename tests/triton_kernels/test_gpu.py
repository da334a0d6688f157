"""The op on a GPU: both paths in 16 bits, CUDA graphs, streams, compilation, and what a backend may refuse."""

from typing import Any

import pytest
import torch
from random_chains import limit
from torch import Tensor

from dlr_lock.runtime import DLRNet, DLRSpec
from dlr_lock.triton_kernels import backend, chain_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
SPECS = [
    DLRSpec(hidden_size=576, lanes=1, depth=36, rank=64),
    DLRSpec(hidden_size=1024, lanes=1, depth=23, rank=48),  # ragged rounds, a rank that is no power of two
    DLRSpec(hidden_size=640, lanes=4, depth=12, rank=32, act="gelu"),
    DLRSpec(hidden_size=512, lanes=16, depth=6, rank=16, act="relu"),  # a lane in one block
]


def filled(spec: DLRSpec, dtype: torch.dtype = torch.bfloat16) -> DLRNet:
    net = DLRNet(spec, dtype=dtype, device="cuda")
    reads, writes = spec.hidden_size**-0.5, (spec.depth * spec.rank) ** -0.5
    for name, parameter in net.named_parameters():
        size = {"dlr_A": reads, "dlr_G": reads, "dlr_B": writes}.get(name, 1.0)
        parameter.data.normal_(std=size)
    return net


def wanted(net: DLRNet, x: Tensor) -> Tensor:
    return chain_reference(x.double(), net.chain.to(torch.float64))


def error(y: Tensor, reference: Tensor) -> float:
    return ((y.double() - reference).square().mean() / reference.square().mean()).sqrt().item()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_the_chain(spec: DLRSpec, tokens: int, dtype: torch.dtype) -> None:
    net = filled(spec, dtype)
    x = torch.randn(tokens, spec.hidden_size, device="cuda")  # float32, so that y is not rounded
    with torch.no_grad():
        reference, most = wanted(net, x), limit(x, net.chain)
        for name in ("triton", "lookahead"):
            with backend(name):
                assert error(net(x), reference) < most < 1e-2, name


@pytest.mark.parametrize("tokens", [1, 200])
def test_a_graph_replays_on_new_input(tokens: int) -> None:
    net, x = filled(SPECS[0]), torch.randn(tokens, 576, device="cuda")
    with torch.no_grad():
        net(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(net(x))
        for _ in range(3):
            x.normal_()
            graph.replay()
            torch.cuda.synchronize()
            again = net(net(x))
            assert error(y, again.double()) < 1e-2


def test_streams_do_not_disturb_each_other() -> None:
    net = filled(SPECS[0])
    inputs = [torch.randn(1, 576, device="cuda") for _ in range(4)]
    with torch.no_grad():
        alone = [net(x) for x in inputs]
        streams = [torch.cuda.Stream() for _ in inputs]
        torch.cuda.synchronize()
        results: list[list[Tensor]] = [[] for _ in inputs]
        for _ in range(20):
            for stream, x, kept in zip(streams, inputs, results, strict=True):
                with torch.cuda.stream(stream):
                    kept.append(net(x))
        torch.cuda.synchronize()
    for y, kept in zip(alone, results, strict=True):
        assert all(error(other, y.double()) < 1e-2 for other in kept)


def test_deterministic_algorithms_give_the_same_bits() -> None:
    net, x = (
        filled(SPECS[0]),
        torch.randn(5, 576, device="cuda"),
    )  # which decode adds up in the order of its CTAs
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad():
            first = net(x)
            assert all(torch.equal(net(x), first) for _ in range(20))
    finally:
        torch.use_deterministic_algorithms(False)


def test_compiles_into_one_graph() -> None:
    net, x = filled(SPECS[0]), torch.randn(3, 576, device="cuda")
    with torch.no_grad():
        reference = net(x)
        compiled = torch.compile(net, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            assert error(compiled(x), reference.double()) < 1e-2


def test_a_token_of_nan_stays_alone() -> None:
    net = filled(SPECS[0])
    for tokens in (8, 200):
        x = torch.randn(tokens, 576, device="cuda")
        x[3, 5] = torch.nan
        with torch.no_grad():
            y = net(x)
            assert y[3].isnan().all() and y[[0, 1, 2, 4]].isfinite().all()
            assert net(x[:2]).isfinite().all()  # nothing is left of it for the next call


@pytest.mark.parametrize(
    ("what", "reason"), [({"act": "mish"}, "no activation 'mish'"), ({"gated": True}, "no gated steps")]
)
def test_what_has_no_kernel_runs_in_plain_torch(what: dict[str, Any], reason: str) -> None:
    net = filled(DLRSpec(hidden_size=128, lanes=1, depth=4, rank=16, **what))
    x = torch.randn(3, 128, device="cuda")
    with torch.no_grad():
        assert error(net(x), wanted(net, x)) < 1e-2
        with backend("triton"), pytest.raises(ValueError, match=reason):
            net(x)
