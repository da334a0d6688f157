"""Stage `kernels`: one MLP slot at a time, every shape, chain and token count of benchmarks.kernels."""

import gc
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from dlr_lock.common.dtypes import dtype_name
from dlr_lock.common.errors import typed_line
from dlr_lock.microbench.bench import ROUNDS, Row, cases_of, cold_weights, numbers
from dlr_lock.microbench.bench import measure as measured
from dlr_lock.microbench.slot import CPU_PROVIDERS, PROVIDERS, Case, Slot, dtype_of
from dlr_lock.microbench.timing import measured_rates
from dlr_lock.runtime import DLRSpec
from dlr_lock.triton_kernels.gpu import device_constants

from ..kernels import CHAINS, SHAPES, SMOKE, TOKENS
from .stage import Record, capture_error, check_device

# The order of worth: what a short visit leaves out stands last.
_CHAINS = ("1", "1x64", "8x64")
_TOKENS = (1, 512, 16, 4096)


def measure(record: Record) -> None:
    """Rows as `dlr-lock bench` has them. Of the plain chain no compiled form, which takes a minute; the MLP's
    beside the default chain alone, for it is the same beside all others."""
    gpu = record.device.type == "cuda"
    dtype = dtype_of("auto", gpu=gpu)
    providers = [name for name in PROVIDERS if name != "naive-compiled"] if gpu else CPU_PROVIDERS
    rounds, cold_bytes = (2, 0) if record.smoke else (ROUNDS, cold_weights(record.device))
    rates = measured_rates(record.device, dtype)
    record.document |= {
        "measured_rates": rates.to_dict(),
        "constants": asdict(device_constants(record.device.index)) if gpu else None,
    }
    record.document["settings"] |= {"rounds": rounds, "cold_bytes": cold_bytes, "dtype": dtype_name(dtype)}

    def failed(case: Case, why: str) -> Row:
        name = "ours-graph" if gpu else "ours-eager"
        ratio = case.spec.params / case.dense_params
        return Row(name, **_key(case), dtype=dtype_name(dtype), params_ratio=ratio,
                   error_message=why)  # fmt: skip

    cases = ordered(smoke=record.smoke)
    with torch.no_grad():
        for case in record.unmeasured(cases, _key, failed):
            gc.collect()
            try:
                if gpu:
                    torch.cuda.empty_cache()
                default = case.spec == DLRSpec.matching(
                    case.spec.hidden_size, case.intermediate, mlp_gated=True
                )
                own = [name for name in providers if default or name != "dense-compiled"]
                slot = Slot(case, record.device, dtype, cold_bytes)
                rows = measured(slot, own, rates, rounds, capture_error)
            except (RuntimeError, MemoryError) as error:  # such as a case that does not fit
                check_device(error)
                rows = [failed(case, typed_line(error))]
            record.add(*rows)


def ordered(*, smoke: bool) -> list[Case]:
    """All cases, those of most worth first."""
    shapes, chains, tokens = (
        (SMOKE["shapes"], SMOKE["chains"], SMOKE["tokens"]) if smoke else (SHAPES, CHAINS, TOKENS)
    )

    def worth(of: Sequence[Any], value: Any) -> int:
        return list(of).index(value) if value in of else len(of)

    listed = [
        ((worth(_CHAINS, chain), worth(_TOKENS, case.tokens)), case)
        for shape in shapes.split(",")
        for chain in chains.split(",")
        for case in cases_of(shape, chain, numbers(tokens))
    ]
    return [case for _, case in sorted(listed, key=lambda pair: pair[0])]


def _key(case: Case) -> dict[str, int]:
    lanes, depth, rank, hidden = case.spec.weight_shape
    return {
        "hidden": hidden, "intermediate": case.intermediate, "lanes": lanes, "depth": depth, "rank": rank,
        "tokens": case.tokens,
    }  # fmt: skip
