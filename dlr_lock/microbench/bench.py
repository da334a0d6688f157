"""One MLP slot, many ways to fill it: what each takes, how exact it is, and what the cost model says.

The dense gated MLP, the plain chain and the chain's fast forms run on the same tokens, in alternating rounds. What
was timed is then held against float64: a provider whose error is over its limit gets no time and no ratio.

Bytes and FLOPs are those that the function needs (its weights, x and y once; its products), so that rates compare
across providers: Gram blocks and a state in memory count against a provider, not for it.
"""

import gc
import math
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..common.dtypes import dtype_name
from ..common.errors import DLRError, capture_error, typed_line
from ..common.machine import machine
from ..runtime.spec import DLRSpec
from ..triton_kernels import chain_reference, cost
from ..triton_kernels.decode_plan import plan_decode
from ..triton_kernels.gpu import device_constants
from .slot import CPU_PROVIDERS, PROVIDERS, Case, DenseWeights, Slot, dense_mlp, dtype_of
from .timing import Rates, Runner, measured_rates, set_times, take_turns

_CACHES = 4  # times the cache: of distinct weights that calls rotate over
ROUNDS = 20
CHECKED_TOKENS = 64
WIDEST = 2**18  # features or hidden units: past this, finding a chain of equal parameters takes seconds
LONGEST = 2**40  # tokens: of the widest state their bytes are still a number to torch
_DIGITS = 18  # of a number in a list: Python refuses 4300, torch a few more than these
_NUMBER = r"([1-9][0-9]{0,8})"
_SHAPE = re.compile(f"{_NUMBER}x{_NUMBER}")
_CHAIN = re.compile(f"{_NUMBER}(?:x{_NUMBER}(?:x{_NUMBER})?)?")


def chain_cases(
    hidden: int,
    intermediate: int,
    *,
    lanes: int = 1,
    depth: int | None = None,
    rank: int | None = None,
    tokens: Sequence[int],
) -> list[Case]:
    """One case a token count, for the chain that `DLRSpec.matching` finds.

    Raises:
        DLRError: On sizes that make no case.
    """
    if not (1 <= hidden <= WIDEST and 1 <= intermediate <= WIDEST):
        raise DLRError(
            f"hidden and intermediate sizes are from 1 to {WIDEST}, not {hidden} and {intermediate}"
        )
    if not tokens or not 1 <= min(tokens) <= max(tokens) <= LONGEST:
        raise DLRError(f"token counts are from 1 to {LONGEST}")
    if not all(size is None or 1 <= size <= WIDEST for size in (lanes, depth, rank)):
        raise DLRError(f"lanes, depth and rank are from 1 to {WIDEST}")
    spec = DLRSpec.matching(hidden, intermediate, mlp_gated=True, lanes=lanes, depth=depth, rank=rank)
    return [Case(spec, intermediate, count) for count in tokens]


def numbers(text: str) -> list[int]:
    """The whole numbers, 1 or more each, in "1,16,512"; raises DLRError on anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= _DIGITS and int(part) for part in parts):
        raise DLRError(f"{text!r} is no list of whole numbers such as 1,16,512")
    return [int(part) for part in parts]


def cases_of(shape: str, chain: str, tokens: Sequence[int]) -> list[Case]:
    """`chain_cases` of texts: "576x1536" is an MLP's shape; "1x36x64" is a chain, "1x36" one of the rank that parity
    gives, "1" one lane of the default depth. Raises DLRError on anything else."""
    mlp, parts = _SHAPE.fullmatch(shape), _CHAIN.fullmatch(chain)
    if mlp is None:
        raise DLRError(f"{shape!r} is no shape of an MLP such as 576x1536")
    if parts is None:
        raise DLRError(f"{chain!r} is no chain such as 1x36x64, 1x36 or 1")
    depth, rank = (int(part) if part else None for part in parts.group(2, 3))
    return chain_cases(int(mlp[1]), int(mlp[2]), lanes=int(parts[1]), depth=depth, rank=rank, tokens=tokens)


@dataclass(slots=True)
class Row:
    """One provider on one case. None: not measured, or not to be had on this device."""

    provider: str
    hidden: int
    intermediate: int
    lanes: int
    depth: int
    rank: int
    tokens: int
    dtype: str
    params_ratio: float  # of the chain to the MLP
    accurate: bool = False
    error: float | None = None  # RMS of the difference to float64 over RMS, on at most CHECKED_TOKENS tokens
    error_limit: float | None = None
    error_message: str | None = None  # of a provider that failed
    median_us: float | None = None  # a call
    p20_us: float | None = None
    p80_us: float | None = None
    launches: int | None = None
    gb_per_s: float | None = None
    copy_percent: float | None = None
    tflop_per_s: float | None = None
    matmul_percent: float | None = None
    ratio_to_dense: float | None = None  # of the times: dense-graph on a GPU, dense-eager on a CPU
    path: str | None = None  # that the cost model means
    predicted_us: float | None = None
    floor_us: float | None = None


def cold_weights(device: torch.device) -> float:
    """Bytes of distinct weights that are never found in a device's cache: four times its L2, of a CPU four times 50 MB.

    Args:
        device: A GPU, with its index, or a CPU.
    """
    return _CACHES * (device_constants(device.index).l2 if device.type == "cuda" else 50e6)


def run(
    cases: Sequence[Case],
    *,
    device: torch.device,
    dtype: str = "auto",
    providers: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    cold_bytes: float | None = None,
    minutes: float | None = None,
    save: Callable[[dict[str, Any]], None] = lambda document: None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measures every provider on every case.

    A provider that fails gets a row that says so; a case that cannot be set up ends the run, with the reason in
    `stopped`.

    Args:
        cases: What is measured.
        device: Where.
        dtype: As `dtype_of` takes it.
        providers: Some of PROVIDERS; None for all on a GPU, for CPU_PROVIDERS on a CPU.
        rounds: Samples a provider.
        cold_bytes: Distinct weights that calls rotate over; `cold_weights` if None.
        minutes: No case is begun after them; None for no limit.
        save: Handed the results so far after every case.
        progress: Called with (what is being done, done, total).

    Returns:
        The results, a JSON object.

    Raises:
        DLRError: On a dtype or providers that are unknown, on providers that want a GPU, and where not even one case
            can be set up.
    """
    names = _checked(providers, device)
    weights = dtype_of(dtype, gpu=device.type == "cuda")
    began = time.monotonic()
    device = _indexed(device)
    if cold_bytes is None:
        cold_bytes = cold_weights(device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), torch.no_grad():
        rates = measured_rates(device, weights)
        document: dict[str, Any] = {
            "schema": 1,
            **machine(device),
            "measured_rates": rates.to_dict(),
            "constants": _constants(device),
            "settings": {"rounds": rounds, "cold_bytes": cold_bytes, "dtype": dtype_name(weights)},
            "cases": len(cases),
            "stopped": None,
            "rows": [],
        }
        for done, case in enumerate(cases):
            progress("benchmark", done, len(cases))
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                document["stopped"] = f"after {done} of {len(cases)} cases: the limit of {minutes:g} minutes"
                break
            try:
                _tidy(device, names)
                slot = Slot(case, device, weights, cold_bytes)
            except (RuntimeError, MemoryError) as error:
                if not document["rows"]:
                    raise DLRError(f"{case.spec} on {case.tokens} tokens: {typed_line(error)}") from error
                document["stopped"] = f"after {done} of {len(cases)} cases: {typed_line(error)}"
                break
            document["rows"] += [asdict(row) for row in measure(slot, names, rates, rounds)]
            save(document)
            del slot
    progress("benchmark", len(cases), len(cases))
    save(document)
    return document


def measure(
    slot: Slot,
    providers: Sequence[str],
    rates: Rates,
    rounds: int,
    capture_error: Callable[[Row], AbstractContextManager[None]] = capture_error,
) -> list[Row]:
    """A row for each of the providers that the slot's case has.

    Args:
        slot: The tensors.
        providers: Some of PROVIDERS.
        rates: What the device reaches, which a row's rates are shares of.
        rounds: Samples a provider.
        capture_error: Gives the context that a row's provider is run in.
    """
    rows: list[Row] = []
    runners: list[Runner | None] = []
    for name in providers:
        row = _row(slot, name)
        runner = None
        with capture_error(row):
            _predict(row, slot)
            call = slot.call(name)
            if call is None:
                continue
            runner = Runner(*call, slot.device, graph=name.endswith("-graph"))
        rows.append(row)
        runners.append(runner)
    times = take_turns(rows, runners, rounds, capture_error)
    judge = cache(partial(_Judge, slot))
    for row, runner, seconds in zip(rows, runners, times, strict=True):
        if runner is not None and row.error_message is None:
            with capture_error(row):
                judge(row.provider.startswith("dense")).judge(row, runner.output())
                if row.accurate:
                    row.launches = runner.launches()
                    _fill(row, slot, seconds, rates)
    base = "dense-graph" if slot.device.type == "cuda" else "dense-eager"
    dense_us = next((r.median_us for r in rows if r.provider == base), None)
    for row in rows:
        if row.median_us and dense_us:
            row.ratio_to_dense = row.median_us / dense_us
    return rows


def error_limit(plain: float, dtype: torch.dtype) -> float:
    """The largest error of a fast form that passes, for weights of a dtype: 1.5 times the error `plain` of the
    definition step by step on the same weights and input, and 1e-5 for float32 where that is more.

    Relative, for what 16 bits cost depends on the chain: 1.3e-3 where updates are as large as x, 6e-3 where they are
    three times as large, 3.4e-3 for one that was trained, of 12 steps all. What the fast forms hold in float32, the
    state and all sums, makes them 0.7 of it; a state in 16 bits 2.8 times, of 12 steps, or 5 times, of 36.
    """
    if not math.isfinite(plain):
        return 0.0
    return max(1e-5, 1.5 * plain) if dtype.itemsize >= 4 else 1.5 * plain


class _Judge:
    """The float64 result of the dense MLP or of the chain, and the largest error that passes.

    That is `error_limit` of the plain form in the weights' dtype.
    """

    def __init__(self, slot: Slot, dense: bool) -> None:
        x = slot.x[:CHECKED_TOKENS]
        if dense:
            weights = slot.dense[0]
            self.wanted = dense_mlp(x.double(), DenseWeights(*(w.double() for w in weights)))
            plain = dense_mlp(x, weights)
        else:
            self.wanted = chain_reference(x.double(), slot.chain[0].to(torch.float64))
            plain = chain_reference(x, slot.chain[0])
        self.limit = error_limit(self._error(plain), slot.dtype)

    def judge(self, row: Row, y: Tensor) -> None:
        """Writes the error of the output y and whether it passes into the row."""
        error = self._error(y[:CHECKED_TOKENS])
        row.error_limit = self.limit
        row.accurate = error <= self.limit
        if math.isfinite(error):
            row.error = error
        else:
            row.error_message = "the output is not finite"

    def _error(self, y: Tensor) -> float:
        return ((y.double() - self.wanted).square().mean() / self.wanted.square().mean()).sqrt().item()


def _row(slot: Slot, provider: str) -> Row:
    case = slot.case
    lanes, depth, rank, hidden = case.spec.weight_shape
    return Row(
        provider, hidden, case.intermediate, lanes, depth, rank, case.tokens, dtype_name(slot.dtype),
        case.spec.params / case.dense_params,
    )  # fmt: skip


def _predict(row: Row, slot: Slot) -> None:
    """Writes the cost model's path, time and floor into the row of a GPU."""
    if slot.device.type != "cuda":
        return
    device, shape = device_constants(slot.device.index), slot.case.shape(slot.dtype)
    row.floor_us = 1e6 * cost.floor_seconds(shape, device)
    width = slot.gram[0].shape[-2]
    family = row.provider.split("-")[0]
    if family == "dense":
        prediction = cost.predict_dense(shape, slot.case.intermediate, device)
    elif family == "prefill":
        prediction = cost.predict_prefill(shape, width, device)
    elif family in ("ours", "decode"):
        decoding = family == "decode"
        plan = plan_decode(shape, device) if decoding else cost.choose(shape, device, width // shape.rank)
        prediction = (
            cost.predict_decode(shape, plan, device) if plan else cost.predict_prefill(shape, width, device)
        )
    else:
        return
    row.path, row.floor_us = prediction.path, 1e6 * prediction.floor
    row.predicted_us = 1e6 * prediction.seconds


def _fill(row: Row, slot: Slot, seconds: list[float], rates: Rates) -> None:
    middle = set_times(row, seconds)
    spec, tokens = slot.case.spec, slot.case.tokens
    dense = row.provider.startswith("dense")
    params = slot.case.dense_params if dense else spec.matrices * math.prod(spec.weight_shape)
    moved = (params + 2 * tokens * spec.hidden_size) * slot.dtype.itemsize
    flops = 2 * tokens * params
    row.gb_per_s, row.copy_percent = moved / middle / 1e9, 100 * moved / middle / rates.copy
    row.tflop_per_s, row.matmul_percent = flops / middle / 1e12, 100 * flops / middle / rates.matmul


def _tidy(device: torch.device, providers: Sequence[str]) -> None:
    """Frees what the case before left; raises RuntimeError where it left the GPU unusable."""
    if any(name.endswith("-compiled") for name in providers):
        torch.compiler.reset()  # its programs are of no use to the next, and their number is limited
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _checked(providers: Sequence[str] | None, device: torch.device) -> Sequence[str]:
    if device.type not in ("cpu", "cuda"):
        raise DLRError(f"benchmarks run on a CPU, CUDA or ROCm device, not on {device.type!r}")
    if providers is None:
        return PROVIDERS if device.type == "cuda" else CPU_PROVIDERS
    for name in providers:
        if name not in PROVIDERS:
            raise DLRError(f"unknown provider {name!r}; one of {', '.join(PROVIDERS)}")
        if name.endswith("-graph") and device.type != "cuda":
            raise DLRError(f"provider {name!r} wants a CUDA or ROCm device")
    return providers


def _indexed(device: torch.device) -> torch.device:
    """The device with its number, which the cost model asks for."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _constants(device: torch.device) -> dict[str, Any] | None:
    return asdict(device_constants(device.index)) if device.type == "cuda" else None
