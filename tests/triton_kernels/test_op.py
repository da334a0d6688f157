"""The op as its users meet it: chosen by backend, compiled, checked by torch, and refusing gradients."""

import pytest
import torch
from torch import Tensor

from dlr_lock.runtime import DLRNet, DLRSpec
from dlr_lock.triton_kernels import backend, chain_reference, dlr_net, gram_blocks


def chain(
    lanes: int = 2, depth: int = 5, rank: int = 16, hidden: int = 48, gated: bool = False
) -> dict[str, Tensor]:
    shape = (lanes, depth, rank, hidden)
    weights = {
        "A": torch.randn(shape) / hidden**0.5,
        "B": torch.randn(shape) / (depth * rank) ** 0.5,
        "scale": torch.rand(hidden),
        "bias": torch.randn(hidden),
    }
    return weights | ({"G": torch.randn(shape) / hidden**0.5} if gated else {})


def filled(gated: bool = False, **shape: int) -> DLRNet:
    net = DLRNet(DLRSpec(hidden_size=48, lanes=2, depth=5, rank=16, gated=gated))
    net.assign({f"dlr_{name}": w for name, w in chain(gated=gated).items()})
    return net


def reference(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    return chain_reference(x.double(), **{name: t.double() for name, t in w.items()})


def assert_close(y: Tensor, wanted: Tensor) -> None:
    ratio = ((y - wanted).square().mean() / wanted.square().mean()).sqrt()
    assert ratio < 2e-6  # float32; a chain whose Gram blocks are left out is off by more than 0.1


@pytest.mark.parametrize("name", ["auto", "lookahead", "naive"])
@pytest.mark.parametrize("gated", [False, True])
def test_every_backend_is_the_chain(name: str, gated: bool) -> None:
    w, x = chain(gated=gated), torch.randn(2, 3, 48)
    with backend(name), torch.no_grad():
        y = dlr_net(x, **w)
        assert y.shape == x.shape and y.dtype == x.dtype
        assert_close(y, reference(x, w))
        G = w.get("G")
        assert_close(dlr_net(x, **w, gram=gram_blocks(w["A"], w["B"], G, block=32)), reference(x, w))


def test_the_variable_chooses_and_the_innermost_block_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = chain(), torch.randn(3, 48, requires_grad=True)
    monkeypatch.setenv("DLR_LOCK_BACKEND", "naive")
    assert dlr_net(x, **w).requires_grad
    with backend("lookahead"), backend("naive"):
        assert dlr_net(x, **w).requires_grad
    monkeypatch.setenv("DLR_LOCK_BACKEND", "fast")
    with pytest.raises(ValueError, match="DLR_LOCK_BACKEND 'fast' is unknown; one of auto, triton"):
        dlr_net(x, **w)
    with pytest.raises(ValueError, match="backend 'quick' is unknown"), backend("quick"):
        pass


def test_a_gradient_is_refused_at_forward_and_names_the_way_out() -> None:
    net, x = filled(), torch.randn(3, 48, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no backward.*backend\('naive'\)"):
        net(x)
    with pytest.raises(RuntimeError, match="no backward"):
        filled().requires_grad_(True)(torch.randn(3, 48))
    with torch.no_grad():
        assert not net(x).requires_grad
    with torch.inference_mode():
        net(x)
    with backend("naive"):
        net(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_triton_on_a_cpu_is_a_clear_error() -> None:
    with backend("triton"), torch.no_grad(), pytest.raises(ValueError, match="wants tensors on a CUDA"):
        dlr_net(torch.randn(3, 48), **chain())


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated: bool) -> None:
    w = chain(gated=gated)
    gram = gram_blocks(w["A"], w["B"], w.get("G"))
    args = (torch.randn(3, 48), w["A"], w["B"], w["scale"], w["bias"], w.get("G"), "silu", gram, "auto")
    torch.library.opcheck(torch.ops.dlr_lock.dlr_net.default, args)


def test_the_fake_kernel_gives_shape_and_dtype_of_any_input() -> None:
    w = chain()
    with torch.device("meta"):
        x = torch.empty(2, 7, 48, dtype=torch.bfloat16)
        meta = {name: torch.empty(t.shape) for name, t in w.items()}
    y = torch.ops.dlr_lock.dlr_net(x, *meta.values(), None, "silu", None, "auto")
    assert y.is_meta and y.shape == x.shape and y.dtype == x.dtype


def test_compiles_into_one_graph() -> None:
    net, x = filled(), torch.randn(3, 48)
    with torch.no_grad():
        wanted = net(x)
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), wanted)
        assert_close(compiled(torch.cat([x, x]))[:3], wanted)  # another number of tokens is summed otherwise


def test_weights_that_changed_get_new_gram_blocks() -> None:
    net, x = filled(), torch.randn(3, 48)
    with torch.no_grad():
        net(x)
        net.dlr_B.mul_(0.5)
        w = {name.removeprefix("dlr_"): p for name, p in net.named_parameters()}
        assert_close(net(x), reference(x, w))
        net.load_state_dict({f"dlr_{name}": t for name, t in chain().items()})
        assert_close(net(x), reference(x, w))
        half = net.to(torch.bfloat16)
        assert half.dlr_gram is not None and half.dlr_gram.dtype == torch.bfloat16


def test_gram_blocks_are_not_part_of_a_checkpoint() -> None:
    net = filled()
    with torch.no_grad():
        net(torch.randn(3, 48))
    assert "dlr_gram" not in net.state_dict()
