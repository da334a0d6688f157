"""What training a locked slot takes against training the MLP: counted tables, and timed forward and backward passes.

    python -m benchmarks.asymmetry [--shapes 576x1536,4096x14336] [--chains 1x36,16x16] [--tokens 4096] [--layers 30]
                                   [--model]
    pytest benchmarks/asymmetry.py --benchmark-only

The first counts every strategy of both sides on tensors without data, for any size on any machine: of one slot, or of a
whole model of such slots. The second, with pytest-benchmark, times a small slot on the best device there is.
"""

import argparse
import sys
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

from dlr_lock import DLRError
from dlr_lock.audit.asymmetry import asymmetries
from dlr_lock.audit.strategies.compare import compare_best
from dlr_lock.audit.strategies.compiled import compiler_errors
from dlr_lock.audit.strategies.model import model_cost
from dlr_lock.audit.strategies.slot import SlotVariant, StrategyCost, slot_costs, slot_variants
from dlr_lock.audit.strategies.table import model_strategies
from dlr_lock.common.dtypes import DTYPES
from dlr_lock.microbench.bench import cases_of
from dlr_lock.microbench.slot import dtype_of
from dlr_lock.reporting import Section, Table, headings, print_sections
from dlr_lock.reporting.words import cell
from dlr_lock.runtime import DLRNet, DLRSpec, best_device

DEVICE = best_device()
HIDDEN, WIDTH, DEPTH = 576, 1536, 36  # the timed slot: SmolLM2-135M's, a chain of many steps
STRATEGIES = {
    "locked": ("plain", "compiled", "checkpoint", "inversion", "look-ahead 256"),
    "original": ("plain", "compiled", "checkpoint", "selective"),
}


@pytest.fixture(scope="module")
def slot() -> dict[str, SlotVariant]:
    gpu = DEVICE.type == "cuda"
    device = torch.device(DEVICE.type, torch.cuda.current_device() if gpu else None)
    spec = DLRSpec.matching(HIDDEN, WIDTH, mlp_gated=True, depth=DEPTH)
    tokens = 4096 if gpu else 256
    return dict(
        zip(
            STRATEGIES,
            slot_variants(spec, WIDTH, tokens=tokens, dtype=dtype_of("auto", gpu=gpu), device=device),
            strict=True,
        )
    )


@pytest.mark.parametrize(
    ("side", "forward"), [("locked", "reference"), ("locked", "runtime"), ("original", "reference")]
)
def test_inference(
    benchmark: BenchmarkFixture, slot: dict[str, SlotVariant], side: str, forward: str
) -> None:
    variant = slot[side]
    benchmark.group = "inference"
    with torch.no_grad():
        benchmark(_finished(lambda: variant.inference[forward](variant.x)))


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize(
    ("side", "name"), [(side, name) for side, names in STRATEGIES.items() for name in names]
)
def test_training(
    benchmark: BenchmarkFixture, slot: dict[str, SlotVariant], side: str, name: str, phase: str
) -> None:
    """A forward pass that can be trained, or the backward pass after it, which frees it."""
    variant = slot[side]
    function, trained = variant.prepare(variant.strategy(name))
    x = variant.x.detach().requires_grad_()
    dy = torch.ones_like(x)

    def forward() -> Tensor:
        return function(x)

    def backward(y: Tensor) -> None:
        _finished(lambda: torch.autograd.grad(y, [x, *trained], dy))()

    try:
        with compiler_errors():
            backward(forward())
    except DLRError as error:
        pytest.skip(str(error))
    benchmark.group = phase
    if phase == "forward":
        benchmark(_finished(forward))
    else:
        benchmark.pedantic(backward, setup=lambda: ((forward(),), {}), rounds=10, warmup_rounds=2)


def _finished(work: Callable[[], object]) -> Callable[[], None]:
    """`work`, over on return."""

    def run() -> None:
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


def main(arguments: list[str] | None = None) -> int:
    """Prints the counted tables that the command line asks for; exit status 2, and one line, on bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.asymmetry", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shapes", default="576x1536", help="MLPs, hidden x intermediate")
    parser.add_argument(
        "--chains", default="1", help="lanes, x depth, x rank; what is left out follows from parity"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of a training step")
    parser.add_argument("--layers", type=int, default=30, help="slots that the compared memory is of")
    parser.add_argument("--model", action="store_true", help="a whole model, in sequences of 1024 tokens")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and x")
    options = parser.parse_args(arguments)
    sections: list[Section] = []
    try:
        for shape in options.shapes.split(","):
            for chain in options.chains.split(","):
                (case,) = cases_of(shape, chain, [options.tokens])
                spec, width = case.spec, case.intermediate
                title = f"{shape} as {spec}, {options.tokens} tokens"
                with FakeTensorMode():
                    if options.model:
                        ours, theirs = _whole_models(spec, width, options)
                        title, layers = f"model of {options.layers} layers, {title}", 1
                    else:
                        dtype, device = DTYPES[options.dtype], torch.device("cpu")
                        locked, original = slot_variants(
                            spec, width, tokens=options.tokens, dtype=dtype, device=device
                        )
                        ours, theirs, layers = slot_costs(locked), slot_costs(original), options.layers
                        sections.append(_asymmetry(title, locked, original))
                sections.append(_strategies(title, {"original": theirs, "locked": ours}))
                if layers > 1:
                    title += f", {layers} layers"
                sections.append(_comparison(title, ours, theirs, layers))
    except DLRError as error:
        print(f"benchmarks.asymmetry: {error}", file=sys.stderr)
        return 2
    print_sections(Console(highlight=False), sections)
    return 0


def _whole_models(
    spec: DLRSpec, width: int, options: argparse.Namespace
) -> tuple[list[StrategyCost], list[StrategyCost]]:
    """(locked, original) rows of a Llama of such MLPs, with heads of 64 features and 49,152 words."""
    heads = max(1, spec.hidden_size // 64)
    config = LlamaConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=width,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=next(heads // n for n in (4, 3, 1) if heads % n == 0),
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    dtype = DTYPES[options.dtype]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    length = min(1024, options.tokens)
    tokens = torch.zeros(options.tokens // length, length, dtype=torch.int64)
    mlps = [f"model.layers.{n}.mlp" for n in range(options.layers)]
    original = [model_cost(model, mlps, p, tokens) for p in model_strategies(locked=False)]
    for name in mlps:
        model.set_submodule(name, DLRNet(spec, dtype=dtype))
    return [model_cost(model, mlps, p, tokens) for p in model_strategies(locked=True)], original


def _strategies(title: str, sides: dict[str, list[StrategyCost]]) -> Section:
    """Each strategy against the original's plain step of the same trainable."""
    rows = []
    for side, of_side in sides.items():
        for row in of_side:
            base = next(r for r in sides["original"] if r.trainable == row.trainable).counts
            counts = row.counts
            assert base is not None and counts is not None
            ratios = (counts.held / base.held, counts.peak / base.peak, counts.flops / base.flops)
            forward, backward = counts.forward, counts.backward
            numbers = (forward.launches + backward.launches, forward.dependent, backward.dependent)
            rows.append(
                (side, row.trainable, row.strategy, *(f"{r:.2f}" for r in ratios), *map(str, numbers))
            )
    columns = "side | trainable | strategy | held | peak | FLOPs | launches | in a row: forward | backward"
    return Section(f"{title}: against the original's plain step", table=Table(headings(columns), rows))


def _comparison(title: str, locked: list[StrategyCost], original: list[StrategyCost], layers: int) -> Section:
    rows = []
    for line in compare_best(locked, original, layers=layers):
        if line.objective.minimise != "seconds":
            names = (row.strategy if row else "none meets it" for row in (line.locked, line.original))
            rows.append((line.trainable, str(line.objective), *names, cell(line.ratio, ".2f")))
    table = Table(headings("trainable | objective | locked | original | ratio"), rows)
    return Section(f"{title}: each with its best strategy", table=table)


def _asymmetry(title: str, locked: SlotVariant, original: SlotVariant) -> Section:
    rows = [
        (a.mode, a.measure, f"{a.locked} / {a.original}", a.forward, f"{a.value:.2f}")
        for a in asymmetries(locked, original)
    ]
    table = Table(headings("mode | measure | strategies | locked forward | ratio"), rows)
    return Section(f"{title}: (backward / forward) locked over original", table=table)


if __name__ == "__main__":
    sys.exit(main())
