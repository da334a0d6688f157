"""The decode kernels: in Triton's interpreter, and on a GPU.

Triton decides on import whether it interprets, so those tests run this file as a program of its own.
"""

import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from decode_calls import Call, assert_same, make_call, make_plan, wanted
from random_chains import limit, rounded_state

from dlr_lock.triton_kernels.activations import KERNEL_ACTS
from dlr_lock.triton_kernels.decode import decode
from dlr_lock.triton_kernels.decode_plan import DecodePlan, plan_decode
from dlr_lock.triton_kernels.gpu import device_constants
from dlr_lock.triton_kernels.rounds import Shape

# ---- the kernels in Triton's interpreter


def interpreted_alone() -> None:
    """One CTA, so that the interpreter, which runs CTAs one after another, comes to an end."""
    acts = list({kernel: name for name, kernel in KERNEL_ACTS.items()}.values())
    tried = set()
    for seed, (K, r, d, T, shape) in enumerate(
        [
            (1, 16, 16, 1, {"tokens": 1, "rows": 16, "columns": 16}),
            (5, 48, 40, 1, {"tokens": 1, "rows": 32, "columns": 64, "held": 2}),
            (
                3,
                84,
                33,
                1,
                {"tokens": 1, "rows": 32, "columns": 64, "held": 1},
            ),  # two tiles of three not held
            (1, 16, 16, 16, {"tokens": 16, "rows": 16, "columns": 16}),
            (4, 40, 40, 3, {"tokens": 16, "rows": 64, "columns": 16, "tiles": 3, "held": 3}),
            (5, 48, 33, 17, {"tokens": 64, "rows": 64, "columns": 16, "tiles": 3, "held": 1}),
            (3, 16, 80, 50, {"tokens": 64, "rows": 16, "columns": 32, "tiles": 3, "held": 2}),
            (2, 32, 64, 2, {"tokens": 16, "rows": 32, "columns": 64}),
            (2, 32, 64, 1, {"tokens": 1, "rows": 32, "columns": 64}),
        ]
    ):
        acts = acts or ["sigmoid", "silu"]
        tried.add(acts[-1])
        launch_twice(make_plan(K, r, d, **shape), T, seed, acts.pop())
    assert {KERNEL_ACTS[act] for act in tried} == set(KERNEL_ACTS.values())


def interpreted_together() -> None:
    """Several CTAs, each a thread: barriers, and the zeroing of rings."""
    threads_for_programs()
    for seed, (K, r, d, T, shape) in enumerate(
        [
            (8, 16, 64, 1, {"tokens": 1, "rows": 16, "columns": 16}),
            (5, 48, 72, 1, {"tokens": 1, "rows": 32, "columns": 32, "held": 2}),
            (3, 16, 40, 1, {"tokens": 1, "rows": 16, "columns": 32, "width": 24}),
            (8, 16, 64, 2, {"tokens": 16, "rows": 16, "columns": 16}),  # one part, four groups
            (6, 80, 30, 3, {"tokens": 16, "rows": 16, "columns": 32}),  # five parts, one group
            (7, 40, 80, 17, {"tokens": 64, "rows": 16, "columns": 16, "tiles": 2, "held": 1}),
        ]
    ):
        launch_twice(make_plan(K, r, d, **shape), T, seed, "silu")


def launch_twice(plan: DecodePlan, T: int, seed: int, act: str) -> None:
    """Against the definition, the second time with a token of NaN."""
    call = make_call(plan, T, seed, act=act, dtype=torch.float32)
    reference = wanted(call)
    assert_same(decode(*call, plan), reference, 2e-6)
    call.x[T - 1] = torch.nan
    y = decode(*call, plan)
    assert y[T - 1].isnan().all()
    if T > 1:
        assert_same(y[: T - 1], reference[: T - 1], 2e-6)


def interpreted_in_16_bits() -> None:
    """With weights of float16, of which the interpreter makes no garbage: the state and all sums are float32."""
    for plan, T in (
        (make_plan(12, 64, 128, tokens=1, rows=64, columns=128), 1),
        (make_plan(12, 64, 128, tokens=16, rows=64, columns=64, tiles=2), 16),
    ):
        x, chain = make_call(plan, T, dtype=torch.float16)
        x = x.float()  # so that y is not rounded
        reference, most = wanted(Call(x, chain)), limit(x, chain)
        assert_same(decode(x, chain, plan), reference, most)
        try:
            assert_same(rounded_state(x, chain), reference, most)
        except AssertionError:
            continue
        raise AssertionError("a rounded state is not noticed")


def threads_for_programs() -> None:
    """Makes the interpreter run the programs of a grid as threads instead of one after another."""
    from triton.runtime import interpreter

    here = threading.local()
    builder = interpreter.interpreter_builder
    type(builder).grid_idx = property(lambda _: here.index, lambda _, index: setattr(here, "index", index))
    sys.setswitchinterval(1e-5)

    class Together(interpreter.GridExecutor):
        def __call__(self, *args, **kwargs) -> None:
            known = inspect.getfullargspec(self.fn).args
            patched = interpreter._patch_lang(self.fn)
            try:
                values = inspect.getcallargs(
                    self.fn, *args, **{k: v for k, v in kwargs.items() if k in known}
                )
                for name in values.keys() - set(self.constexprs):
                    values[name] = interpreter._implicit_cvt(values[name])
                builder.set_grid_dim(*self.grid)

                def program(i: int) -> None:
                    here.index = (i, 0, 0)
                    self.fn(**values)

                with ThreadPoolExecutor(self.grid[0]) as pool:
                    list(pool.map(program, range(self.grid[0])))
            finally:
                patched.restore()

    interpreter.GridExecutor = Together


def run_here(name: str, tmp_path: Path, interpret: bool) -> str:
    """What `name` prints, in a Python of its own."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1" if interpret else "0",
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, __file__, name], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", ["interpreted_alone", "interpreted_in_16_bits", "interpreted_together"])
def test_kernel_in_the_interpreter(name: str, tmp_path: Path) -> None:
    run_here(name, tmp_path, interpret=True)


# ---- the kernels on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("tokens", [1, 2, 16, 32, 64])
@pytest.mark.parametrize(
    ("K", "r", "d"), [(36, 64, 576), (144, 16, 576), (12, 192, 576), (16, 768, 2048), (37, 576, 4096)]
)
def test_kernel_on_gpu(K: int, r: int, d: int, tokens: int) -> None:
    plan = plan_decode(Shape(1, K, r, d, tokens), device_constants(torch.cuda.current_device()))
    if plan is None:
        pytest.skip("has no plan on this device")
    call = make_call(plan, tokens, dtype=torch.bfloat16, device="cuda")
    ys = [decode(*call, plan) for _ in range(20)]
    reference = wanted(call)
    for y in ys:
        assert_same(y, reference, limit(*call))


if __name__ == "__main__":
    programs: dict[str, Callable[[], None]] = {
        "interpreted_alone": interpreted_alone,
        "interpreted_in_16_bits": interpreted_in_16_bits,
        "interpreted_together": interpreted_together,
    }
    programs[sys.argv[1]]()
