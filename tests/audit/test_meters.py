"""Counted costs, not timings: against counts made by hand, formulas, and torch's own counter."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dlr_lock.audit import Meter, count_step, saved_bytes, time_step
from dlr_lock.audit.meters import device_peak
from dlr_lock.common.timing import median_seconds
from dlr_lock.microbench.slot import DenseWeights, dense_mlp
from dlr_lock.runtime import DLRNet, DLRSpec
from dlr_lock.triton_kernels import ChainWeights, chain_reference, dlr_net, gram_blocks, lookahead
from dlr_lock.triton_kernels.meter import count

TOKENS, FEATURES, WIDTH = 40, 576, 1536  # SmolLM2-135M's MLP: K * r = 1.5 * 1536 for every depth below


def chain(lanes: int, depth: int, rank: int, d: int, gated: bool = False) -> ChainWeights:
    A, B, G = (torch.randn(lanes, depth, rank, d) for _ in range(3))
    return ChainWeights(A, B, torch.rand(d), torch.rand(d), G if gated else None)


def trained(weights: ChainWeights | DenseWeights) -> list[Tensor]:
    """The tensors, each with a gradient wanted."""
    return [w.requires_grad_() for w in weights if isinstance(w, Tensor)]


def filled(depth: int, dtype: torch.dtype = torch.float32) -> DLRNet:
    spec = DLRSpec.matching(FEATURES, WIDTH, mlp_gated=True, depth=depth)
    assert spec.depth == depth and spec.depth * spec.rank == 2304
    net = DLRNet(spec, dtype=dtype)
    net.assign({name: torch.randn_like(p) / 20 for name, p in net.named_parameters()})
    return net


def test_launches_and_the_longest_chain_of_them() -> None:
    x, W = torch.randn(6, 5), torch.randn(4, 5)

    def work() -> Tensor:
        a = x @ W.T  # a view and a product
        b = (x + 1).sum()
        return a.mul_(2).add_(torch.empty(6, 4).fill_(3)) * b  # the empty tensor is no launch

    got = count(work)
    assert (got.launches, got.dependent) == (7, 4)  # product, mul_, add_, *; beside them: +, sum, fill_
    assert got.flops == 2 * 6 * 5 * 4


def test_a_take_starts_anew() -> None:
    meter, x = Meter(), torch.randn(3)
    with meter:
        y = (x + 1) * 2
        assert meter.take().dependent == 2
        y.mul_(2)
    assert (meter.take().dependent, meter.take().launches) == (1, 0)


def test_bytes_alive_and_at_the_peak() -> None:
    meter, x = Meter(), torch.randn(100)
    with meter:
        a = x * 2
        b = torch.cat([a, a])
        assert meter.live == 1200
        half = b[:50]  # a view keeps all of its storage
        del a, b
        assert (meter.live, meter.peak) == (800, 1200)
        x.add_(1)  # there before: free
        assert meter.live == 800
    del half
    assert (meter.live, meter.peak) == (0, 1200)


@pytest.mark.parametrize("lanes", [1, 2])
def test_the_op_s_flops_are_look_ahead_s(lanes: int) -> None:
    """Of blocks of 3 steps, of which the last has 2; counted at the products that look-ahead makes."""
    weights, x = chain(lanes, 8, 16, 48), torch.randn(9, 48)
    gram = gram_blocks(weights.A, weights.B, block=48)
    by_op = count(lambda: dlr_net(x, weights, gram))
    by_products = count(lambda: lookahead(x, weights, gram=gram))
    # The op's formula: with both matrices, and with all earlier steps of a block (3 + 3 + 1 pairs).
    assert by_op.flops == 2 * 9 * lanes * (8 * 16 * 48 * 2 + 7 * 16 * 16)
    assert by_products.flops == by_op.flops
    assert by_op.dependent == by_op.launches == 3 * 3


@pytest.mark.parametrize("lanes", [1, 2])
def test_the_op_s_flops_of_gated_steps_are_the_definition_s(lanes: int) -> None:
    weights, x = chain(lanes, 8, 16, 48, gated=True), torch.randn(9, 48)
    by_op, by_products = count(lambda: dlr_net(x, weights)), count(lambda: chain_reference(x, weights))
    assert by_op.flops == by_products.flops == 2 * 9 * lanes * 8 * 16 * 48 * 3
    assert by_op.dependent == by_op.launches == 8 * 5


def test_the_op_s_launches_are_its_prefill_s() -> None:
    weights, x = chain(1, 7, 16, 48), torch.randn(9, 48)
    for block, launches in ((16, 7 * 2), (48, 3 + 3 + 2), (64, 3 + 3), (112, 3)):
        gram = gram_blocks(weights.A, weights.B, block=block)
        assert count(lambda gram=gram: dlr_net(x, weights, gram)).launches == launches


@pytest.mark.parametrize("locked", [False, True])
def test_flops_agree_with_torch_s_counter_and_the_definition(locked: bool) -> None:
    gate, up, down = torch.randn(96, 64), torch.randn(96, 64), torch.randn(64, 96)
    weights = chain(1, 4, 48, 64) if locked else DenseWeights(gate, up, down)
    wanted, run = trained(weights), chain_reference if locked else dense_mlp
    x = torch.randn(8, 64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return run(x, weights)

    got = count_step(function, x, wanted)
    with FlopCounterMode(display=False) as theirs:
        function(x).sum().backward()
    params = sum(w.numel() for w in wanted if w.dim() > 1)
    assert got.flops == theirs.get_total_flops() == 3 * 2 * 8 * params
    assert got.forward.flops == 2 * 8 * params


def test_attention_is_counted_on_a_cpu() -> None:
    q, k, v = (torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3))
    step = count_step(lambda q: nn.functional.scaled_dot_product_attention(q, k, v), q, [k, v])
    product = 2 * 2 * 3 * 7 * 7 * 8
    assert (step.forward.flops, step.backward.flops) == (2 * product, 5 * product)


def test_held_is_saved_and_the_output_is_not() -> None:
    """x of an earlier layer counts where it is kept; the output, and parameters, never."""
    W = torch.randn(5, 4, requires_grad=True)
    x = torch.randn(3, 4, requires_grad=True)
    step = count_step(lambda x: nn.functional.silu(x @ W.T), x, [W])
    assert step.saved == step.held == 4 * (3 * 4 + 3 * 5)  # x and the product
    frozen = W.detach()
    step = count_step(lambda x: nn.functional.silu(x @ frozen.T), x, [])
    assert step.saved == step.held == 4 * 3 * 5  # the product: a frozen matrix wants no x


def test_fake_tensors_count_the_same() -> None:
    def step() -> object:
        weights = chain(2, 3, 16, 32)
        wanted = trained(weights)
        x = torch.randn(8, 32, requires_grad=True)
        return count_step(lambda x: chain_reference(x, weights), x, wanted)

    with FakeTensorMode():
        fake = step()
    assert fake == step()


def test_counting_and_timing_change_nothing() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    before = [p.clone() for p in layer.parameters()]
    parameters = list(layer.parameters())
    count_step(layer, x, parameters)
    seconds = time_step(layer, x, parameters, repeats=1)
    assert seconds.step == seconds.forward + seconds.backward + seconds.update > 0
    assert median_seconds(lambda: layer(x), x.device, 1) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert x.grad is None and all(p.grad is None for p in parameters)
    assert device_peak(lambda: layer(x), x.device) is None


def slot_bytes(module: nn.Module) -> int:
    """Saved by a module inside a network: its input arrives with a gradient of its own."""
    module.requires_grad_(True)
    x = torch.randn(TOKENS, FEATURES, requires_grad=True)
    return saved_bytes(module, lambda: module(x).square().sum())


def test_saved_activations_grow_linearly_with_depth() -> None:
    at = {depth: slot_bytes(filled(depth)) for depth in (12, 24, 48)}
    a_step = (at[24] - at[12]) / 12
    assert (at[48] - at[24]) / 24 == a_step
    assert a_step == 4 * TOKENS * FEATURES  # the state z, in float32


@pytest.mark.parametrize("grad", [False, True])
def test_the_runtime_s_forward_saves_nothing(grad: bool) -> None:
    """Neither in inference nor, of weights and tokens that want no gradient, with autograd on."""
    net, x, meter = filled(24), torch.randn(TOKENS, FEATURES), Meter()
    with torch.set_grad_enabled(grad):
        net(x)  # prepares its Gram blocks
        with meter:
            y = net(x)
    assert meter.live == meter.bytes_of(y) == y.nbytes
    with pytest.raises(RuntimeError, match="no backward"):
        net.requires_grad_(True)(x)


@pytest.mark.parametrize("shared", [False, True])
def test_a_storage_counts_once_and_parameters_never(shared: bool) -> None:
    layer = nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    y = x if shared else x * 1.0
    # The product saves x and the weight; the elementwise product saves both of its factors.
    got = saved_bytes(layer, lambda: (layer(x) * y).sum())
    assert got == 4 * (4 * 8) * (2 if shared else 3)
