"""The decode kernel itself: in Triton's interpreter, compiled, and on a GPU.

Triton decides on import whether it interprets, so those tests run this file as a program of its own.
"""

import dataclasses
import inspect
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from aot import MATRIX_UNITS, cubin_resources
from decode_calls import assert_same, make_call, make_plan, stored_gram, wanted

from dlr_lock.triton_kernels import ChainWeights
from dlr_lock.triton_kernels.activations import KERNEL_ACTS, triton_form
from dlr_lock.triton_kernels.decode import DecodePlan, decode, workspace


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(17, 64)}, r"x must be \[1 to 16, 64\]"),
        (
            {"chain": ChainWeights(*2 * [torch.zeros(1, 4, 16, 48)], *2 * [torch.zeros(48)])},
            r"\[1, 4, 16, 64\]",
        ),
        ({"gram": None}, "Gram blocks"),
        ({"gram": torch.zeros(1, 2, 48, 48)}, "multiple of 32"),
    ],
)
def test_tensors_that_do_not_fit(change: dict, message: str) -> None:
    plan = make_plan(1, 4, 16, 64, 2, 2)
    with pytest.raises(ValueError, match=message):
        decode(*make_call(plan, 2)._replace(**change), plan=plan, workspace=workspace(plan, "cpu"))


# ---- the kernel in Triton's interpreter


def interpreted_alone() -> None:
    """One CTA a lane, so that the interpreter, which runs CTAs one after another, comes to an end."""
    acts = list({kernel: name for name, kernel in KERNEL_ACTS.items()}.values())
    tried = set()
    for seed, (L, K, r, d, S, T, options) in enumerate(
        [
            (1, 1, 16, 16, 1, 1, {}),
            (1, 5, 48, 40, 2, 3, {}),
            (3, 4, 16, 33, 4, 2, {}),
            (2, 3, 16, 72, 2, 17, {"tokens": 32, "tile": 32}),
            (1, 4, 16, 48, 2, 4, {}),
            (2, 3, 16, 50, 1, 2, {"tile": 16}),
            (2, 3, 16, 50, 3, 2, {"deterministic": True}),
            (1, 6, 32, 64, 3, 16, {}),
            (2, 2, 16, 20, 2, 2, {}),
            (1, 4, 48, 40, 4, 2, {"part": 16}),
            (2, 3, 80, 33, 2, 3, {"part": 32}),
            (1, 2, 84, 40, 1, 2, {"part": 16}),
            (1, 3, 40, 72, 2, 2, {"part": 32, "tile": 32}),
            (1, 3, 40, 24, 3, 2, {"part": 16, "deterministic": True}),
        ]
    ):
        acts = acts or ["sigmoid", "silu"]
        tried.add(acts[-1])
        launch_twice(make_plan(L, K, r, d, S, 1, **options), T, seed, acts.pop())
    assert {KERNEL_ACTS[act] for act in tried} == set(KERNEL_ACTS.values())
    plan = make_plan(1, 5, 40, 40, 3, 1, part=32)
    x, chain, _ = call = make_call(plan, 2, dtype=torch.float32)
    gram = stored_gram(chain.A, chain.B, 5)  # of all steps: no multiple of a round's
    assert_same(decode(x, chain, gram, plan=plan, workspace=workspace(plan, "cpu")), wanted(call), 2e-6)


def interpreted_together() -> None:
    """Several CTAs a lane, each a thread: barriers, turns, and the zeroing by the last to leave."""
    threads_for_programs()
    for seed, (L, K, r, d, S, C, T, options) in enumerate(
        [
            (1, 8, 16, 64, 2, 4, 2, {}),
            (2, 5, 48, 72, 2, 3, 3, {}),
            (2, 4, 16, 80, 2, 2, 17, {"tokens": 32, "tile": 16}),
            (2, 3, 16, 48, 1, 3, 1, {}),
            (2, 4, 16, 48, 2, 3, 2, {"deterministic": True}),
            (1, 5, 48, 72, 3, 3, 2, {"part": 16}),
            (2, 3, 80, 48, 2, 2, 3, {"part": 32}),
            (1, 3, 84, 64, 1, 4, 1, {"part": 32}),
            (2, 3, 40, 80, 2, 2, 17, {"tokens": 32, "part": 16, "tile": 16}),
            (1, 3, 40, 48, 2, 3, 2, {"part": 32, "deterministic": True}),
        ]
    ):
        launch_twice(make_plan(L, K, r, d, S, C, **options), T, seed, "silu")


def launch_twice(plan: DecodePlan, T: int, seed: int, act: str) -> None:
    """Against the definition, the second time with a token of NaN, on one workspace that is left zero."""
    memory = workspace(plan, "cpu")
    call = make_call(plan, T, seed, act=act, dtype=torch.float32)
    reference = wanted(call)
    assert_same(decode(*call, plan=plan, workspace=memory), reference, 2e-6)
    call.x[T - 1] = torch.nan
    y = decode(*call, plan=plan, workspace=memory)
    assert y[T - 1].isnan().all()
    if T > 1:
        assert_same(y[: T - 1], reference[: T - 1], 2e-6)
    assert not memory.values[: plan.zeroed].any()
    assert not memory.counters.any()


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


# ---- the kernel compiled ahead of time


def compiled() -> None:
    """Resources on sm_90 of the plans that it was made for, as JSON lines."""
    for (lanes, depth, rank), tokens in [
        ((1, 168, 128), 1),
        ((1, 336, 64), 1),
        ((1, 128, 160), 1),
        ((1, 64, 336), 16),
        ((1, 32, 672), 1),
        ((1, 37, 576), 16),
        ((4, 64, 80), 1),
        ((8, 64, 48), 1),
        ((1, 128, 160), 32),
        ((1, 336, 64), 64),
        ((1, 128, 160), 64),
        ((8, 64, 48), 64),
    ]:
        plan = DecodePlan.choose(lanes=lanes, depth=depth, rank=rank, hidden=4096, tokens=tokens, sms=132)
        print(json.dumps({"plan": dataclasses.asdict(plan)} | resources(plan)))


def resources(plan: DecodePlan) -> dict[str, int]:
    """Registers, stack, local and shared bytes of the bfloat16 kernel on sm_90, and its products."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dlr_lock.triton_kernels.decode import decode_kernel, launch_options

    constants = plan.constants() | {"BLOCK": 8, "ACT": triton_form("silu")}
    if plan.steps == 1:
        constants |= {"p_gram": None}
    wide = {"p_scale": "*fp32", "p_bias": "*fp32", "p_values": "*fp32", "p_counters": "*i32"}
    names = decode_kernel.arg_names
    signature = {n: wide.get(n, "*bf16" if n.startswith("p_") else "i32") for n in names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [i for i, n in enumerate(names) if n not in constants and n != "T"]
    kernel = triton.compile(
        ASTSource(
            decode_kernel,
            signature=signature,
            constexprs={(names.index(n),): value for n, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
        target=GPUTarget("cuda", 90, 32),
        options=launch_options(plan),
    )
    products = len(re.findall(MATRIX_UNITS, kernel.asm["ptx"]))
    return cubin_resources(kernel.asm["cubin"]) | {"shared": kernel.metadata.shared, "products": products}


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


@pytest.mark.parametrize("name", ["interpreted_alone", "interpreted_together"])
def test_kernel_in_the_interpreter(name: str, tmp_path: Path) -> None:
    run_here(name, tmp_path, interpret=True)


def test_kernel_compiles_without_spills(tmp_path: Path) -> None:
    for line in run_here("compiled", tmp_path, interpret=False).splitlines():
        kernel = json.loads(line)
        assert kernel["stack"] == kernel["local"] == 0, kernel
        assert kernel["shared"] <= 232448, kernel
        assert kernel["products"] > 0, kernel


# ---- the kernel on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("tokens", [1, 4, 16, 32, 64])
@pytest.mark.parametrize(
    ("L", "K", "r", "d"),
    [(1, 36, 64, 576), (1, 144, 16, 576), (2, 24, 48, 2048), (8, 21, 64, 2048)],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_kernel_on_gpu(L: int, K: int, r: int, d: int, tokens: int, deterministic: bool) -> None:
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    plan = DecodePlan.choose(
        lanes=L, depth=K, rank=r, hidden=d, tokens=tokens, sms=sms, deterministic=deterministic
    )
    call = make_call(plan, tokens, dtype=torch.bfloat16, device="cuda")
    memory = workspace(plan, "cuda")
    ys = [decode(*call, plan=plan, workspace=memory) for _ in range(20)]
    reference = wanted(call)
    for y in ys:
        assert_same(y, reference, 3e-3 * max(1.0, math.sqrt(K / 32)))
    if deterministic:
        assert all(torch.equal(y, ys[0]) for y in ys)
    assert not memory.values[: plan.zeroed].any()
    assert not memory.counters.any()


if __name__ == "__main__":
    programs: dict[str, Callable[[], None]] = {
        "interpreted_alone": interpreted_alone,
        "interpreted_together": interpreted_together,
        "compiled": compiled,
    }
    programs[sys.argv[1]]()
