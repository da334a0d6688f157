"""Teacher activations, against what the MLPs of real tiny models compute when called by hand."""

import gc
import os
from pathlib import Path

import pytest
import torch
from tiny import HIDDEN as D
from tiny import VOCABULARY, tiny_model

from dlr_lock.common.dtypes import products_in
from dlr_lock.common.errors import DLRError
from dlr_lock.convert.activations.capture import capture, group_layers
from dlr_lock.convert.mlp_discovery import find_mlps

LAYERS, SEQUENCES, LENGTH = 4, 6, 16
N = SEQUENCES * LENGTH
ONE_LAYER = 2 * N * D * 4  # bytes in float32


def make(kind, **options):
    return tiny_model(kind, layers=LAYERS, **options)


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


def by_hand(model, mlps, tokens):
    """All x and y of one undisturbed pass, [N, d] each."""
    seen = {}
    hooks = []
    for mlp in mlps:

        def before(module, args, name=mlp.module):
            seen[name, "x"] = args[0].reshape(-1, D).clone()

        def after(module, args, output, name=mlp.module):
            seen[name, "y"] = output.reshape(-1, D).clone()

        hooks.append(model.get_submodule(mlp.module).register_forward_pre_hook(before))
        hooks.append(model.get_submodule(mlp.output).register_forward_hook(after))
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return seen


def check(model, tokens, **options):
    mlps = find_mlps(model)
    assert len(mlps) == LAYERS
    seen = by_hand(model, mlps, tokens)
    order = []
    for mlp, activations in capture(model, mlps, tokens, dtype=torch.float32, **options):
        order.append(mlp.module)
        assert activations.x.shape == activations.y.shape == (N, D) and len(activations) == N
        torch.testing.assert_close(activations.x, seen[mlp.module, "x"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(activations.y, seen[mlp.module, "y"], rtol=1e-5, atol=1e-6)
    assert order == [mlp.module for mlp in mlps]


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "bloom", "phi3", "gemma2", "bert"])
@pytest.mark.parametrize("layers_at_once", [0.5, 3])
def test_inputs_and_outputs_of_every_mlp(kind, layers_at_once, tokens, tmp_path):
    check(make(kind), tokens, max_memory=int(layers_at_once * ONE_LAYER), scratch=tmp_path / "scratch")


def test_products_in_bfloat16_move_activations_little(tokens, tmp_path):
    model = tiny_model("llama", layers=2, hidden_size=256, intermediate_size=512)
    mlps = find_mlps(model)
    options = {"dtype": torch.float32, "scratch": tmp_path, "max_memory": 2**30}
    with products_in(torch.bfloat16):  # as where CPUs have them
        for mlp, activations in capture(model, mlps, tokens, **options):
            with torch.no_grad():
                y = model.get_submodule(mlp.module)(activations.x)
            error = ((activations.y - y).square().sum() / y.square().sum()).item()
            assert 1e-7 < error < 1e-4  # a chain's is 0.05 and more


def test_sequences_stay_whole_and_in_order_over_batches(llama, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("dlr_lock.convert.activations.capture.BATCH_TOKENS", 4 * LENGTH)
    seen = []
    check(llama, tokens, max_memory=2 * ONE_LAYER, scratch=tmp_path, progress=lambda *at: seen.append(at))
    assert seen == [(0, 6), (4, 6), (6, 6)] * 2  # two passes, two layers each


def test_dtype_and_first_tokens(llama, tokens, tmp_path):
    mlps = find_mlps(llama)[:1]
    for _, activations in capture(llama, mlps, tokens, max_memory=10**9, scratch=tmp_path):
        assert activations.first.nonzero().flatten().tolist() == list(range(0, N, LENGTH))
        assert activations.x.dtype == activations.y.dtype == torch.bfloat16
        want = by_hand(llama, mlps, tokens)[mlps[0].module, "y"].bfloat16()
        torch.testing.assert_close(activations.y, want, rtol=0.01, atol=1e-5)
        assert not activations.x.requires_grad


def test_layers_that_fit_share_a_pass(llama):
    mlps = find_mlps(llama)
    size = ONE_LAYER // 2  # bfloat16

    def sizes(max_memory):
        return [len(group) for group in group_layers(mlps, N, max_memory)]

    assert sizes(100 * size) == [4]
    assert sizes(4 * size) == [4]
    assert sizes(4 * size - 1) == [3, 1]
    assert sizes(2 * size) == [2, 2]
    assert sizes(0) == [1, 1, 1, 1]
    assert [len(group) for group in group_layers(mlps, N, 2 * size, torch.float32)] == [1, 1, 1, 1]
    assert group_layers([], N, size) == []


@pytest.mark.parametrize("at_once", [1, 2])
def test_never_more_than_the_budget_in_memory(llama, tokens, tmp_path, at_once):
    """Counted at every step of every pass, while the caller still holds the last activations it was given."""
    counts = []

    def count(*_):
        alive = {
            o.untyped_storage().data_ptr()
            for o in gc.get_objects()
            if type(o) is torch.Tensor and o.shape == (N, D) and o.dtype == torch.float64
        }
        counts.append(len(alive))

    mlps = find_mlps(llama)
    budget = at_once * 2 * ONE_LAYER  # float64: a dtype nobody else uses here
    for _, activations in capture(
        llama, mlps, tokens, max_memory=budget, scratch=tmp_path, dtype=torch.float64, progress=count
    ):
        assert activations.x.isfinite().all()
        count()
    assert max(counts) == 2 * at_once
    count()
    assert counts[-1] == 0


def test_released_activations_say_so(llama, tokens, tmp_path):
    stream = capture(llama, find_mlps(llama), tokens, max_memory=10**9, scratch=tmp_path)
    first = next(stream)[1]
    assert next(stream)[1].x.any()  # of the same pass
    with pytest.raises(RuntimeError, match="released"):
        _ = first.y
    stream.close()
    kept = [a for _, a in capture(llama, find_mlps(llama), tokens, max_memory=10**9, scratch=tmp_path)]
    with pytest.raises(RuntimeError, match="released"):
        _ = kept[0].x
    with pytest.raises(RuntimeError, match="released"):
        kept[-1].rows(torch.tensor([0]))


def spilled_bytes():
    """Bytes of deleted, still mapped activation files of this process."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "activations-" in line:
            begin, end = line.split()[0].split("-")
            total += int(end, 16) - int(begin, 16)
    return total


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at /proc")
def test_a_layer_too_large_goes_to_disk_and_leaves_nothing(llama, tokens, tmp_path):
    scratch = tmp_path / "scratch"
    spilled = []
    for _, activations in capture(
        llama, find_mlps(llama), tokens, max_memory=ONE_LAYER - 1, scratch=scratch, dtype=torch.float32
    ):
        assert activations.mapped
        spilled.append(spilled_bytes())
    assert spilled == [ONE_LAYER] * LAYERS  # one layer at a time; 24,576 bytes each for x and y: whole pages
    assert spilled_bytes() == 0 and not list(scratch.iterdir())

    stream = capture(llama, find_mlps(llama), tokens, max_memory=0, scratch=scratch)
    next(stream)
    assert spilled_bytes() > 0
    stream.close()  # the caller gives up in the middle
    assert spilled_bytes() == 0 and not list(scratch.iterdir())

    fits = capture(llama, find_mlps(llama), tokens, max_memory=ONE_LAYER, scratch=tmp_path / "unused")
    assert not next(fits)[1].mapped and not (tmp_path / "unused").exists()


def test_nothing_is_left_on_disk_after_a_broken_pass(tokens, tmp_path):
    broken = make("llama")
    with torch.no_grad():
        broken.model.layers[2].mlp.up_proj.weight[3, 4] = float("inf")
    with pytest.raises(DLRError, match=r"layers.2.mlp"):
        for _ in capture(broken, find_mlps(broken), tokens, max_memory=0, scratch=tmp_path):
            pass
    assert not list(tmp_path.iterdir())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in broken.modules())


def test_rows_in_the_order_asked_for(llama, tokens, tmp_path):
    index = torch.randint(N, (64,), generator=torch.Generator().manual_seed(2))  # some twice
    for budget in (0, 10**9):
        for _, activations in capture(llama, find_mlps(llama), tokens, max_memory=budget, scratch=tmp_path):
            assert activations.mapped == (budget == 0)
            x, y = activations.rows(index)
            assert torch.equal(x, activations.x[index]) and torch.equal(y, activations.y[index])
            x.zero_()  # a copy: the activations stay
            assert activations.x.any()


def test_a_full_disk_is_an_error_and_not_a_crash(llama, tokens, tmp_path):
    """In a process whose files may not grow beyond 4 KiB (a full disk fails in the same call)."""
    mlps = find_mlps(llama)
    pid = os.fork() if hasattr(os, "fork") else pytest.skip("needs fork")
    if pid == 0:
        status = 1
        try:
            import resource
            import signal

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            next(capture(llama, mlps, tokens, max_memory=0, scratch=tmp_path))
        except DLRError as error:
            status = 0 if "no room" in str(error) and "--max-memory" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert not list(tmp_path.iterdir())


def test_a_scratch_folder_that_cannot_be(llama, tokens, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DLRError, match="file"):
        next(capture(llama, find_mlps(llama), tokens, max_memory=0, scratch=tmp_path / "file"))


def test_nan_and_infinity_name_the_module(tokens, tmp_path):
    for value in ("nan", "inf"):
        model = make("opt")
        with torch.no_grad():
            model.model.decoder.layers[1].fc2.bias[0] = float(value)
        with pytest.raises(DLRError, match=r"output of model.decoder.layers.1.fc2 contains NaN or infinity"):
            list(capture(model, find_mlps(model), tokens, max_memory=10**9, scratch=tmp_path))


def test_float16_range(tokens, tmp_path):
    model = make("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e8)
    mlps = find_mlps(model)[:1]
    with pytest.raises(DLRError, match=r"layers.0.mlp exceeds the range of torch.float16"):
        list(capture(model, mlps, tokens, max_memory=10**9, scratch=tmp_path, dtype=torch.float16))
    assert list(capture(model, mlps, tokens, max_memory=10**9, scratch=tmp_path))


def test_a_module_that_is_not_called(llama, tokens, tmp_path):
    model = make("llama")
    model.config.num_hidden_layers = 3  # transformers then leaves the last layer out
    with pytest.raises(DLRError, match=r"layers.3.mlp is not called"):
        list(capture(model, find_mlps(llama), tokens, max_memory=10**9, scratch=tmp_path))


def test_a_module_that_is_called_twice(tokens, tmp_path):
    """ALBERT runs the same layer again and again; a Llama can share one MLP between two layers."""
    model = make("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    mlps = find_mlps(make("llama"))
    for some in (mlps, mlps[:1]):
        with pytest.raises(DLRError, match=r"layers.0.mlp is called 2 times"):
            list(capture(model, some, tokens, max_memory=10**9, scratch=tmp_path))


def test_a_module_that_does_not_exist(tokens, tmp_path):
    mlps = find_mlps(make("gpt2"))
    with pytest.raises(DLRError, match=r"no module transformer.h.0.mlp"):
        list(capture(make("llama"), mlps, tokens, max_memory=10**9, scratch=tmp_path))


def test_the_pass_ends_behind_the_last_mlp(tokens, tmp_path):
    model = make("llama")
    mlps = find_mlps(model)[:2]  # runs the model, too
    calls = {"last layer": 0, "head": 0}

    def counts(name):
        def hook(module, args, output):
            calls[name] += len(output.flatten())

        return hook

    model.model.layers[-1].mlp.register_forward_hook(counts("last layer"))
    model.lm_head.register_forward_hook(counts("head"))
    list(capture(model, mlps, tokens, max_memory=10**9, scratch=tmp_path))
    assert calls["head"] == 0
    assert 0 < calls["last layer"] <= 8 * D  # the trial on 8 tokens, nothing of the text


def test_the_model_is_left_as_it_was(llama, tokens, tmp_path):
    model = make("llama", attention_dropout=0.5)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
    model.train()
    stream = capture(model, find_mlps(model), tokens, max_memory=0, scratch=tmp_path)
    for _, activations in stream:
        assert activations.x.isfinite().all()
        # Between two layers the caller may train, or run the model: no hook is in the way, gradients are on.
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert model.training and not any(m._forward_hooks for m in model.modules())
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, before)
    model(input_ids=tokens, labels=tokens).loss.backward()


def test_no_layers_or_no_text(llama, tokens, tmp_path):
    assert list(capture(llama, [], tokens, max_memory=0, scratch=tmp_path)) == []
    assert list(capture(llama, find_mlps(llama), tokens[:0], max_memory=0, scratch=tmp_path)) == []
