"""The native function is the chain, on fresh random weights; and where it cannot be built, chains run all the same."""

import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from random_chains import drawn, error
from torch import Tensor

from dlr_lock.triton_kernels import ACTIVATIONS, ChainWeights, backend, chain_reference, dlr_net, native
from dlr_lock.triton_kernels.activations import NATIVE_ACTS

COMPILER = sys.platform.startswith("linux") and shutil.which("g++")
compiled = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")


def by_native(x: Tensor, chain: ChainWeights) -> Tensor:
    with backend("native"), torch.no_grad():
        return dlr_net(x, chain)


# Of the processor: what it lacks of its own is left out, so that all forms are tried on the best one.
FLAGS = native.vector_flags()
FORMS = [FLAGS[: len(FLAGS) - left] for left in ((0, 1) if "-mavx512bf16" in FLAGS else (0,))]
if "-mavx512f" in FLAGS:
    FORMS.append(("-mavx2", "-mfma"))
FORMS.append(())


@pytest.fixture(params=FORMS, ids=lambda flags: flags[-1] if flags else "none")
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """The function as compiled for a processor that has these instructions."""
    monkeypatch.setattr(native, "vector_flags", lambda: request.param)
    native.library.cache_clear()
    yield request.param
    native.library.cache_clear()


def bound(chain: ChainWeights, flags: tuple[str, ...] = FLAGS) -> float:
    """Weights are widened, and nothing is rounded, but where pairs of bfloat16 numbers are multiplied."""
    return 4e-3 if "-mavx512bf16" in flags and chain.A.dtype == torch.bfloat16 else 1e-6


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_chain(form: tuple[str, ...], dtype: torch.dtype) -> None:
    # The last has more rows than fit a block.
    for sizes in ((1, 12, 16, 96), (3, 5, 48, 64), (1, 1, 64, 144), (1, 2, 96, 2064)):
        chain = drawn(*sizes, dtype)
        for tokens in (1, 2, 3, 4, 7, 16, 33, 67):
            x = torch.randn(tokens, sizes[-1])
            y = by_native(x, chain)
            assert error(y, x, chain) < bound(chain, form)
            assert torch.equal(y[-1:], by_native(x[-1:], chain))  # whatever other tokens there are


@compiled
def test_rounds_as_torch_does(form: tuple[str, ...]) -> None:
    chain, x = drawn(1, 3, 16, 48, torch.float32), torch.randn(40, 48).to(torch.bfloat16)
    x[3, 5] = float("nan")
    rounded, whole = by_native(x, chain), by_native(x.float(), chain)
    assert rounded[3].isnan().all()
    assert torch.equal(rounded[4:], whole[4:].to(torch.bfloat16))


@compiled
@pytest.mark.parametrize("threads", [2, 3])  # the third has no share of a step of 1 MiB
def test_any_number_of_threads_which_are_those_of_torch(threads: int) -> None:
    chain, x = drawn(2, 3, 256, 1024, torch.bfloat16), torch.randn(5, 1024)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = by_native(x, chain)
        assert error(y, x, chain) < bound(chain)
        assert all(torch.equal(by_native(x, chain), y) for _ in range(50))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    assert len([path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))]) == 1


@compiled
@pytest.mark.parametrize("act", sorted(NATIVE_ACTS))
def test_every_activation(act: str) -> None:
    chain = drawn(1, 5, 16, 48, torch.float32, act)
    chain = chain._replace(B=chain.B / 2)
    for size in (1.0, 30.0):  # where exponentials saturate, too
        x = size * torch.randn(6, 48)
        naive = error(chain_reference(x, chain), x, chain)
        assert error(by_native(x, chain), x, chain) < max(1e-6, 2 * naive)


@compiled
@pytest.mark.parametrize("change", ["h * 1.001f", "p * sigmoid(p) + 1e-4f"])
def test_a_function_that_is_off_by_little_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native.NATIVE_ACTS, "silu", change.replace("h", "(p * sigmoid(p))"))
    native.library.cache_clear()
    try:
        chain, x = drawn(1, 12, 16, 96, torch.float32), torch.randn(4, 96)
        assert error(by_native(x, chain), x, chain) > 1e-5
    finally:
        native.library.cache_clear()


@compiled
def test_a_token_of_nan_stays_alone_and_infinity_is_no_number_of_ours() -> None:
    chain, x = drawn(2, 6, 16, 48, torch.float32), torch.randn(5, 48)
    spoiled = x.clone()
    spoiled[2, 7] = float("nan")
    y, z = by_native(x, chain), by_native(spoiled, chain)
    assert z[2].isnan().all() and torch.equal(y[[0, 1, 3, 4]], z[[0, 1, 3, 4]])


@compiled
def test_runs_for_few_tokens_of_any_shape_and_dtype() -> None:
    chain = drawn(1, 5, 16, 48, torch.bfloat16)
    x = torch.randn(2, 3, 48).to(torch.bfloat16)
    with torch.no_grad():
        y = dlr_net(x, chain)
        assert torch.equal(y, by_native(x, chain)) and y.shape == x.shape and y.dtype == x.dtype
        assert torch.equal(dlr_net(x.mT.contiguous().mT, chain), y)
        with backend("plain"):
            assert not torch.equal(dlr_net(x, chain), y)
        assert by_native(x[:0], chain).shape == (0, 3, 48)


@compiled
def test_what_it_cannot_run_is_named_and_runs_in_plain_torch() -> None:
    chain, x = drawn(1, 4, 16, 48, torch.float32), torch.randn(3, 48)
    odd = drawn(1, 4, 16, 40, torch.float32)
    half = chain._replace(A=chain.A.half(), B=chain.B.half())
    turned = chain._replace(A=chain.A.mT.contiguous().mT)
    mish = chain._replace(act="mish")
    gated = chain._replace(G=chain.A)
    for wrong, why in (
        (odd, "multiples of 16, not 40"), (half, "no weights of torch.float16"), (turned, "contiguous weights"),
        (mish, "no activation 'mish'"), (gated, "no gated steps"),
    ):  # fmt: skip
        tokens = x[:, : wrong.A.shape[-1]]
        with pytest.raises(ValueError, match=f"backend 'native' .*{why}"):
            by_native(tokens, wrong)
        with torch.no_grad():
            assert error(dlr_net(tokens, wrong), tokens, wrong) < 2e-3
    assert set(NATIVE_ACTS) <= set(ACTIVATIONS)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine on which nothing was compiled yet: its cache folder."""
    monkeypatch.setenv("DLR_LOCK_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    yield tmp_path / "cache"
    native.library.cache_clear()


@compiled
def test_is_compiled_once_and_by_every_process_where_it_cannot_be_kept(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **named: calls.append(args) or run(*args, **named))
    chain, x = drawn(1, 4, 16, 48, torch.float32), torch.randn(3, 48)
    for _ in range(2):
        by_native(x, chain)
        native.library.cache_clear()
    assert len(calls) == 2  # compiled and linked
    assert [path.suffix for path in (fresh / "native").iterdir()] == [".so"]
    shutil.rmtree(fresh)
    fresh.write_text("no folder")
    assert error(by_native(x, chain), x, chain) < 1e-6 and len(calls) == 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="made for Linux")
def test_without_a_compiler_chains_run_in_plain_torch(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, x = drawn(1, 4, 16, 48, torch.float32), torch.randn(3, 48)
    monkeypatch.setenv("PATH", str(fresh))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error(dlr_net(x, chain), x, chain) < 1e-6
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        by_native(x, chain)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="made for Linux")
def test_a_compiler_that_fails_is_warned_of_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, x = drawn(1, 4, 16, 48, torch.float32), torch.randn(3, 48)
    monkeypatch.setenv("CXX", "false")
    with torch.no_grad(), pytest.warns(UserWarning, match="could not be built.*plain torch") as caught:
        for _ in range(3):
            assert error(dlr_net(x, chain), x, chain) < 1e-6
    assert len(caught) == 1
