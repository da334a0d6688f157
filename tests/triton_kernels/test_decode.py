"""The decode kernel: its schedule in every order, the kernel itself in Triton's interpreter, and compiled.

Triton decides on import whether it interprets, so those tests run this file as a program of its own.
"""

import dataclasses
import inspect
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from aot import MATRIX_UNITS, cubin_resources
from decode_steps import STUCK, Cta, Memory, ScheduleError, columns, orders, part_rows, run

from dlr_lock.triton_kernels import ChainWeights, chain_reference
from dlr_lock.triton_kernels.activations import KERNEL_ACTS, triton_form
from dlr_lock.triton_kernels.decode import DecodePlan, decode, workspace

ORDERS = tuple(orders(0))


def make_plan(L: int, K: int, r: int, d: int, S: int, C: int, tile: int = 0, **options) -> DecodePlan:
    """A plan of exactly these numbers; tile 0: the whole slice. A step is one part unless options say so."""
    width = math.ceil(d / C / 16) * 16
    tile = tile or max(16, 1 << (width - 1).bit_length())
    options = {"tokens": 16, "part": max(16, 1 << (r - 1).bit_length())} | options
    return DecodePlan(lanes=L, depth=K, rank=r, hidden=d, steps=S, slices=C, tile=tile, **options)


class Call(NamedTuple):
    """What `decode` takes beside a plan and its workspace."""

    x: torch.Tensor
    chain: ChainWeights
    gram: torch.Tensor | None


def make_call(
    plan: DecodePlan, T: int, seed: int = 0, blocks: int = 2, act="silu", dtype=torch.float64, device="cpu"
) -> Call:
    """A call for a plan, with Gram blocks of `blocks` rounds; updates as large as x."""
    generator = torch.Generator().manual_seed(seed)
    L, K, r, d = plan.lanes, plan.depth, plan.rank, plan.hidden

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B = draw(L, K, r, d) / math.sqrt(d), 1.5 * draw(L, K, r, d) / math.sqrt(K * r)
    x, scale, bias = draw(T, d), draw(d), draw(d)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    chain = ChainWeights(A.to(dtype), B.to(dtype), scale.to(state), bias.to(state), act=act).to(device)
    return Call(x.to(device, dtype), chain, stored_gram(chain.A, chain.B, blocks * plan.steps))


def stored_gram(A: torch.Tensor, B: torch.Tensor, steps: int) -> torch.Tensor:
    """[L, N, m, m] for blocks of `steps` steps: B_j A_i^T at (j, i) for j before i, else zero."""
    L, K, r, d = A.shape
    dtype, pad = A.dtype, (0, 0, 0, 0, 0, -K % steps)
    A, B = (torch.nn.functional.pad(w.double(), pad).reshape(L, -1, steps * r, d) for w in (A, B))
    before = torch.ones(steps, steps, dtype=torch.bool, device=A.device).triu(1)
    mask = before.repeat_interleave(r, 0).repeat_interleave(r, 1)
    return ((B @ A.mT) * mask).to(dtype)


def wanted(call: Call) -> torch.Tensor:
    """y by the definition, in float64 on the same weights."""
    return chain_reference(call.x.double(), call.chain.to(torch.float64))


def assert_same(y: torch.Tensor, reference: torch.Tensor, ratio: float) -> None:
    error = (y.double() - reference).square().mean().sqrt() / reference.square().mean().sqrt()
    assert error <= ratio, f"RMS error {error:.2e} of the output's"


PLANS = [  # L, K, r, d, S, C, T, options
    (1, 1, 16, 16, 1, 1, 1, {}),
    (1, 7, 16, 100, 3, 4, 1, {}),  # a ragged last round and a ragged last slice
    (1, 8, 48, 96, 4, 3, 5, {}),
    (3, 5, 16, 72, 2, 1, 3, {"tile": 32}),  # one CTA a lane, its slice in three tiles
    (2, 4, 16, 80, 2, 2, 17, {"tokens": 32, "tile": 16}),
    (2, 5, 16, 64, 2, 4, 4, {}),
    (8, 3, 16, 48, 1, 3, 2, {}),
    (8, 4, 16, 64, 4, 4, 2, {}),
    (1, 12, 16, 64, 1, 4, 2, {}),
    (1, 6, 48, 64, 3, 4, 2, {"part": 16}),
    (2, 5, 80, 48, 2, 3, 3, {"part": 32}),  # a ragged last part
    (1, 3, 100, 80, 1, 2, 1, {"part": 32}),  # as 336 in parts of 64 or 128: a step a round
    (2, 4, 40, 64, 2, 2, 5, {"part": 32}),
    (1, 4, 41, 72, 4, 1, 2, {"part": 16, "tile": 32}),
]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", PLANS, ids=str)
def test_schedule_in_every_order(case: tuple, deterministic: bool) -> None:
    """Three launches on one workspace, in every order, against the definition."""
    L, K, r, d, S, C, T, options = case
    plan = make_plan(L, K, r, d, S, C, deterministic=deterministic, **options)
    memory = Memory(plan)
    for launch, name in enumerate(ORDERS):
        call = make_call(plan, T, seed=launch)
        y = run(*call, plan=plan, memory=memory, order=orders(launch)[name])
        assert_same(y, wanted(call), 1e-12)


def test_schedule_random() -> None:
    """Shapes and orders at random, the same ones every time."""
    draw = torch.Generator().manual_seed(0)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    for case in range(40):
        L, K, S = pick(1, 2, 3), pick(1, 2, 5, 6, 9), pick(1, 2, 3, 4)
        r, d = pick(16, 32, 48), pick(16, 33, 64, 112, 130)
        C = math.ceil(d / (16 * math.ceil(d / pick(1, 2, 3, 5) / 16)))
        options = {"deterministic": bool(pick(0, 0, 1)), "tile": pick(0, 16, 32)}
        options["part"] = pick(16, 32, 64)
        plan = make_plan(L, K, r, d, S, C, **options)
        call = make_call(plan, pick(1, 2, 16), seed=case, blocks=pick(1, 3), act="gelu")
        y = run(*call, plan=plan, memory=Memory(plan), order=orders(case)["random"])
        assert_same(y, wanted(call), 1e-12)


class NoWait(Cta):
    def wait(self, n: int) -> Iterator[str]:
        yield "passed"


class EarlyReset(Cta):
    """Whoever passes the last wait first resets the counter."""

    def wait(self, n: int) -> Iterator[str]:
        yield from super().wait(n)
        if n == self.plan.rounds - 1:
            self.memory.counters[self.barrier] = 0


class EarlyClear(Cta):
    """Zeroes the buffer that is being read."""

    def clear(self, n: int) -> Iterator[str]:
        yield from super().clear(n + 1)


class NoClear(Cta):
    def clear(self, n: int) -> Iterator[str]:
        yield "kept"


class WaitsForTooMany(Cta):
    def wait(self, n: int) -> Iterator[str]:
        while self.memory.counters[self.barrier] <= self.arrivals(n):
            yield STUCK


class NobodyLeaves(Cta):
    def leave(self) -> Iterator[str]:
        yield "gone"


def test_rounds_that_do_not_divide_a_block_of_all_steps() -> None:
    plan = make_plan(2, 7, 40, 64, 3, 2, part=32)
    x, chain, _ = call = make_call(plan, 2)
    gram = stored_gram(chain.A, chain.B, 7)
    y = run(x, chain, gram, plan=plan, memory=Memory(plan), order=orders(0)["random"])
    assert_same(y, wanted(call), 1e-12)
    with pytest.raises(ValueError, match="multiple of 120"):
        plan.check(x, chain, gram.expand(2, 2, -1, -1))


def broken_gram(call: Call) -> Call:
    """The Gram block of the second round with two of its steps swapped."""
    gram = call.gram.clone()
    half = gram.shape[-1] // 2
    gram[..., half:, half:] = gram[..., half:, half:].mT
    return call._replace(gram=gram)


@pytest.mark.parametrize("mutant", [NoWait, EarlyReset, EarlyClear, NoClear, WaitsForTooMany, NobodyLeaves])
def test_a_broken_schedule_is_found(mutant: type[Cta]) -> None:
    """Each of these is wrong in some order, or leaves the workspace dirty; the schedule itself never."""
    plan = make_plan(2, 8, 16, 64, 2, 4)
    call = make_call(plan, 2)
    assert not any(fails(plan, call, name, Cta) for name in ORDERS)
    assert any(fails(plan, call, name, mutant) for name in ORDERS)


def test_a_broken_gram_block_is_found() -> None:
    plan = make_plan(1, 8, 16, 64, 2, 4)
    assert fails(plan, broken_gram(make_call(plan, 2)), "round robin", Cta)


def fails(plan: DecodePlan, call: Call, order: str, cta: type[Cta]) -> bool:
    try:
        y = run(*call, plan=plan, memory=Memory(plan), order=orders(0)[order], cta=cta)
    except ScheduleError:
        return True
    return not torch.allclose(y, wanted(call))


def test_plan_chosen() -> None:
    """The plan's rule: all CTAs resident, every column held once, what cannot be is refused."""
    for L, d, sms, T in itertools.product((1, 8, 32), (576, 2048, 4096, 5120), (20, 132, 148), (1, 5, 64)):
        if sms < L:
            continue
        plan = DecodePlan.choose(lanes=L, depth=12, rank=48, hidden=d, tokens=T, sms=sms)
        assert plan.lanes * plan.slices <= sms
        assert plan.tokens >= T
        assert plan.tile * plan.chunks >= plan.slice_width
        slices = [columns(plan, c) for c in range(plan.slices)]
        assert [c.start for c in slices] == [0] + [c.stop for c in slices[:-1]]
        assert slices[-1].stop == d
        rows = [part_rows(plan, q) for q in range(plan.parts)]
        assert [q for part in rows for q in range(plan.rank)[part]] == list(range(plan.rank))
    with pytest.raises(ValueError, match="133 lanes do not fit 132"):
        DecodePlan.choose(lanes=133, depth=1, rank=16, hidden=64, tokens=1, sms=132)
    with pytest.raises(ValueError, match="65"):
        DecodePlan.choose(lanes=1, depth=1, rank=16, hidden=64, tokens=65, sms=132)
    with pytest.raises(ValueError, match="empty"):
        make_plan(1, 1, 16, 64, 1, 7)


@pytest.mark.parametrize(
    ("lanes", "depth", "rank", "hidden"),
    [(1, 32, 672, 4096), (1, 64, 336, 4096), (1, 128, 160, 4096), (8, 64, 48, 4096), (1, 64, 192, 2048)],
)
def test_weights_of_a_slice_are_requested_at_once(lanes: int, depth: int, rank: int, hidden: int) -> None:
    """At few tokens a slice is one tile, and a round as wide as its Gram tiles allow."""
    plan = DecodePlan.choose(lanes=lanes, depth=depth, rank=rank, hidden=hidden, tokens=1, sms=132)
    assert plan.chunks == 1
    assert plan.steps == (1 if rank > 192 else 2)
    assert plan.parts * plan.part < 1.34 * rank


def test_block_of_all_steps_is_shared_out_evenly() -> None:
    def steps(depth: int, block: int) -> int:
        plan = DecodePlan.choose(
            lanes=1, depth=depth, rank=16, hidden=2048, tokens=1, sms=132, block_steps=block
        )
        return plan.steps

    assert [steps(22, 22), steps(23, 32), steps(44, 22), steps(44, 24)] == [11, 8, 11, 8]


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
                builder.set_grid_dim(*self.grid, 1, 1)

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
