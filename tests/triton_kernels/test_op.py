"""The op as its users meet it: chosen by backend, compiled, checked by torch, and refusing gradients."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlr_lock.runtime import DLRNet, DLRSpec
from dlr_lock.triton_kernels import (
    ChainWeights,
    backend,
    chain_reference,
    current_backend,
    dlr_net,
    gram_blocks,
)


def drawn(gated: bool = False) -> ChainWeights:
    shape = (2, 5, 16, 48)
    A, G = (torch.randn(shape) / 48**0.5 for _ in range(2))
    B = torch.randn(shape) / 80**0.5
    return ChainWeights(A, B, torch.rand(48), torch.randn(48), G if gated else None)


def named(chain: ChainWeights) -> dict[str, Tensor]:
    """The chain's tensors under their names in a checkpoint."""
    return {f"dlr_{name}": t for name, t in chain._asdict().items() if isinstance(t, Tensor)}


def filled(gated: bool = False) -> DLRNet:
    net = DLRNet(DLRSpec(hidden_size=48, lanes=2, depth=5, rank=16, gated=gated))
    net.assign(named(drawn(gated)))
    return net


def reference(x: Tensor, chain: ChainWeights) -> Tensor:
    return chain_reference(x.double(), chain.to(torch.float64))


def assert_close(y: Tensor, wanted: Tensor) -> None:
    ratio = ((y - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30)).sqrt()
    assert ratio < 2e-6  # float32; a chain whose Gram blocks are left out is off by more than 0.1


@pytest.mark.parametrize("name", ["auto", "lookahead", "naive"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(48,), (2, 3, 48), (0, 48)])
def test_every_backend_is_the_chain(name: str, gated: bool, shape: tuple[int, ...]) -> None:
    chain, x = drawn(gated), torch.randn(shape)
    with backend(name), torch.no_grad():
        y = dlr_net(x, chain)
        assert y.shape == x.shape and y.dtype == x.dtype
        assert_close(y, reference(x, chain))
        if not gated:
            assert_close(dlr_net(x, chain, gram_blocks(chain.A, chain.B, block=32)), reference(x, chain))


def test_the_variable_chooses_and_the_innermost_block_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    chain, x = drawn(), torch.randn(5, 48, requires_grad=True)
    monkeypatch.setenv("DLR_LOCK_BACKEND", "naive")
    assert dlr_net(x, chain).requires_grad
    with backend("lookahead"), backend("naive"):
        assert dlr_net(x, chain).requires_grad
    monkeypatch.setenv("DLR_LOCK_BACKEND", "fast")
    with pytest.raises(ValueError, match="DLR_LOCK_BACKEND 'fast' is unknown; one of auto, triton"):
        dlr_net(x, chain)
    with pytest.raises(ValueError, match="backend 'quick' is unknown"), backend("quick"):
        pass


def test_a_gradient_is_refused_at_forward_and_names_the_way_out() -> None:
    net, x = filled(), torch.randn(5, 48, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no backward.*backend\('naive'\)"):
        net(x)
    with pytest.raises(RuntimeError, match="no backward"):
        filled().requires_grad_(True)(torch.randn(5, 48))
    with torch.no_grad():
        assert not net(x).requires_grad
    with torch.inference_mode():
        net(x)
    with backend("naive"):
        net(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_triton_on_a_cpu_is_a_clear_error() -> None:
    with backend("triton"), torch.no_grad(), pytest.raises(ValueError, match="wants tensors on a CUDA"):
        dlr_net(torch.randn(5, 48), drawn())


def test_gated_chains_run_by_their_definition() -> None:
    net, x = filled(gated=True), torch.randn(5, 48)
    with torch.no_grad():
        assert torch.equal(net(x), chain_reference(x, net.chain)) and net.dlr_gram is None
        assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(x), net(x))
        assert net.to(torch.bfloat16)(x).dtype == torch.float32 and net.dlr_gram is None
        with backend("triton"), pytest.raises(ValueError, match="'triton' has no gated steps"):
            net(x)
        with pytest.raises(ValueError, match="gated chain has no Gram blocks"):
            dlr_net(x, net.chain, gram_blocks(net.dlr_A, net.dlr_B))
    with pytest.raises(RuntimeError, match="no backward"):
        net(x.requires_grad_())


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated: bool) -> None:
    chain = drawn(gated)
    gram = None if gated else gram_blocks(chain.A, chain.B)
    args = (torch.randn(5, 48), *chain, gram, "auto")
    torch.library.opcheck(torch.ops.dlr_lock.dlr_net.default, args)


def test_the_fake_kernel_gives_shape_and_dtype_of_any_input() -> None:
    x = torch.empty(2, 7, 48, dtype=torch.bfloat16, device="meta")
    y = torch.ops.dlr_lock.dlr_net(x, *drawn().to("meta"), None, "auto")
    assert y.is_meta and y.shape == x.shape and y.dtype == x.dtype


def test_compiles_into_one_graph() -> None:
    net, x = filled(), torch.randn(5, 48)
    with torch.no_grad():
        wanted = net(x)
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), wanted)
        assert_close(compiled(torch.cat([x, x]))[:5], wanted)  # another number of tokens is summed otherwise


@pytest.fixture
def by_lookahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that has Gram blocks on a CPU, too."""
    monkeypatch.setenv("DLR_LOCK_BACKEND", "lookahead")


def test_a_cpu_makes_no_gram_blocks_unasked() -> None:
    net, x = filled(), torch.randn(5, 48)
    net.prepare()
    with torch.no_grad():
        net(x)
        assert net.dlr_gram is None
        with backend("lookahead"):
            assert_close(net(x), reference(x, net.chain))
        assert net.dlr_gram is not None


@pytest.mark.usefixtures("by_lookahead")
def test_weights_that_changed_get_new_gram_blocks() -> None:
    net, x = filled(), torch.randn(5, 48)
    with torch.no_grad():
        net(x)
        net.dlr_B.mul_(0.5)
        assert_close(net(x), reference(x, net.chain))
        net.load_state_dict(named(drawn()))
        assert_close(net(x), reference(x, net.chain))
        half = net.to(torch.bfloat16)
        assert half.dlr_gram is not None and half.dlr_gram.dtype == torch.bfloat16


@pytest.mark.usefixtures("by_lookahead")
def test_gram_blocks_are_not_part_of_a_checkpoint() -> None:
    net = filled()
    with torch.no_grad():
        net(torch.randn(5, 48))
    assert net.dlr_gram is not None and "dlr_gram" not in net.state_dict()


@pytest.mark.usefixtures("by_lookahead")
def test_fused_training_between_two_inferences_is_seen() -> None:
    """Fused optimizers do not count their writes."""
    net, x = filled(), torch.randn(5, 48)
    with torch.no_grad():
        net(x)
    net.requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
    with backend("naive"):
        for _ in range(5):
            net(x).square().sum().backward()
            optimizer.step()
    for trainable in (True, False):
        with torch.no_grad():
            assert_close(net.requires_grad_(trainable)(x), reference(x, net.chain))


@pytest.mark.usefixtures("by_lookahead")
@pytest.mark.parametrize("way", ["assign", "parameter", "data", "vector", "functional"])
def test_weights_that_are_swapped_get_new_gram_blocks(way: str) -> None:
    net, x, chain = filled(), torch.randn(5, 48), drawn()
    state = named(chain)
    with torch.no_grad():
        net(x)
        if way == "assign":
            net.load_state_dict(state, assign=True)
        elif way == "functional":
            assert_close(torch.func.functional_call(net, state, (x,)), reference(x, chain))
            return
        elif way == "vector":
            torch.nn.utils.vector_to_parameters(
                torch.cat([state[n].flatten() for n, _ in net.named_parameters()]), net.parameters()
            )
        else:
            for name, t in state.items():
                if way == "parameter":
                    setattr(net, name, torch.nn.Parameter(t, requires_grad=False))
                else:
                    getattr(net, name).data = t
        assert_close(net(x), reference(x, chain))


@pytest.mark.usefixtures("by_lookahead")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_runs_on_weights_of_its_own(copied: Callable[[DLRNet], DLRNet]) -> None:
    net, x = filled(), torch.randn(5, 48)
    with torch.no_grad():
        wanted = net(x)
        other = copied(net)
        assert torch.equal(other(x), wanted)
        other.dlr_B.mul_(0.5)
        assert_close(other(x), reference(x, other.chain))
        assert torch.equal(net(x), wanted)


def test_autocast_does_not_reach_into_a_chain() -> None:
    net, x = filled(), torch.randn(5, 48)
    with torch.no_grad():
        wanted = net(x)
        fresh = filled()
        fresh.load_state_dict(net.state_dict())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(net(x), wanted)
            assert torch.equal(fresh(x), wanted)


def test_weights_that_were_not_loaded_are_an_error() -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="several devices: cpu, meta"):
        filled().to("meta")(torch.randn(5, 48))


def test_inference_mode_from_the_start() -> None:
    with torch.inference_mode():
        net, x = filled(), torch.randn(5, 48)
        assert_close(net(x), reference(x, net.chain))


def test_scale_and_bias_stay_float32() -> None:
    net = filled()
    net.dlr_scale.data.fill_(1e5)
    net.half()
    assert net.dlr_A.dtype == torch.float16 and net.dlr_scale.dtype == torch.float32
    assert net.dlr_scale.eq(1e5).all()


def test_forward_derivatives_are_refused_too() -> None:
    net, x = filled(), torch.randn(5, 48)
    with pytest.raises(RuntimeError, match="no backward"):
        torch.func.jvp(net, (x,), (x,))


def test_blocks_of_two_threads_may_end_in_any_order() -> None:
    first, second = backend("lookahead"), backend("naive")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert current_backend() == "naive"
    second.__exit__(None, None, None)
    assert current_backend() == "auto"


def test_tensors_that_do_not_fit_are_named() -> None:
    chain, x = drawn(), torch.randn(5, 48)
    gram = gram_blocks(chain.A, chain.B)
    wrong = {
        "scale and bias must be": {"chain": chain._replace(scale=torch.ones(1))},
        "Gram blocks of shape": {"gram": gram[:1]},
        "float16 do not fit": {"gram": gram.half()},
        "one float dtype": {"chain": chain._replace(B=chain.B.double())},
        "float tokens": {"x": torch.ones(3, 48, dtype=torch.int64)},
        "48 features|do not fit a chain": {"x": torch.ones(())},
    }
    for message, change in wrong.items():
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            dlr_net(**({"x": x, "chain": chain, "gram": gram} | change))
    with pytest.raises(ValueError, match="dlr_A is"):
        filled().assign(named(chain._replace(A=chain.A[:1])))
