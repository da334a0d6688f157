"""Running a model layer by layer must be running the model, whatever the architecture."""

import pytest
import torch
from locked import Given
from test_mlp_discovery import EXPECTED
from tiny import VOCABULARY, tiny_model

from dlr_lock.convert.layer_runner import LayerRunner, Unrepeatable
from dlr_lock.convert.mlp_discovery import find_mlps

# A norm stands between y and the sum: there is no place where y is added as it is.
NORMED = {"gemma2", "gemma3_text", "olmo2"}


def tokens(sequences: int = 3, n: int = 40) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (sequences, n))


@pytest.mark.parametrize("arch", EXPECTED)
def test_layers_run_alone_are_the_model(arch: str) -> None:
    model = tiny_model(arch, layers=3)
    mlps, ids = find_mlps(model), tokens()
    stack = LayerRunner(model, mlps, ids)
    seen: list[torch.Tensor] = []
    holder = mlps[-1].module.split(".2.")[0]
    last = model.get_submodule(f"{holder}.2")
    last.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    for rows in (ids[:2], ids[2:]):  # two sizes of batch
        hidden = stack.embed(rows)
        for index in range(len(stack)):
            hidden = stack.run(index, hidden)
        seen.clear()
        with torch.no_grad():
            model.base_model(rows)
        assert torch.allclose(hidden, seen[0], atol=1e-5)


@pytest.mark.parametrize("arch", EXPECTED)
def test_the_sum_is_found(arch: str) -> None:
    """Whatever the MLP gives, the total moves by it: checked at another change than the one searched with."""
    model = tiny_model(arch, layers=2)
    mlps, ids = find_mlps(model), tokens(2)
    stack = LayerRunner(model, mlps, ids)
    hidden = stack.run(0, stack.embed(ids))
    where = stack.find_sum(mlps[1], hidden)
    if arch in NORMED:
        assert where is None
        return
    assert where is not None and where.factor == pytest.approx(1, abs=1e-4)
    before = stack.look(mlps[1], hidden, where)
    after = stack.look(mlps[1], hidden, where, instead={mlps[1].module: Given(2 * before.y - 3)})
    assert before.total is not None and after.total is not None
    moved = (after.total - before.total).view_as(before.y)
    assert torch.allclose(moved, before.y - 3, atol=1e-4)


def test_what_depends_on_the_text_beside_hidden_states_is_refused() -> None:
    model = tiny_model("t5", layers=2)
    decoder = [mlp for mlp in find_mlps(model) if "decoder" in mlp.module]
    with pytest.raises(Unrepeatable, match="encoder"):
        LayerRunner(model, decoder, tokens())
    model = tiny_model("llama", layers=2)
    mlps = find_mlps(model)
    gates = iter(range(100))
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda m, a, k: (a, k | {"gate": next(gates)}), with_kwargs=True)
    with pytest.raises(Unrepeatable, match="text"):
        LayerRunner(model, mlps, tokens())


def test_layers_that_something_happens_between_are_refused() -> None:
    model = tiny_model("llama", layers=2)
    mlps = find_mlps(model)
    model.model.layers[0].register_forward_hook(lambda m, a, out: out, always_call=True)
    model.model.layers[1].register_forward_pre_hook(lambda m, a: (2 * a[0], *a[1:]))
    with pytest.raises(Unrepeatable, match="between"):
        LayerRunner(model, mlps, tokens())
