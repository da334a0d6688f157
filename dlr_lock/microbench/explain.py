"""What the cost model says of a chain, in full: floor, prediction of each path, choice and why."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..common.dtypes import dtype_name
from ..common.errors import DLRError
from ..triton_kernels import cost
from ..triton_kernels.cost import Prediction
from ..triton_kernels.decode_plan import plan_decode
from ..triton_kernels.gpu import H200, Device, device_constants
from .slot import Case, dtype_of


def explain(cases: Sequence[Case], *, device: torch.device, dtype: str = "auto") -> dict[str, Any]:
    """What the cost model makes of cases that share a chain; nothing runs.

    Args:
        cases: The chain on several numbers of tokens.
        device: A GPU, or anything else for an H200's constants, which `assumed` then says.
        dtype: As `dtype_of` takes it for a GPU.

    Returns:
        A JSON object, times in microseconds.

    Raises:
        DLRError: On a dtype that is unknown, and on a chain that the kernels cannot hold.
    """
    weights = dtype_of(dtype, gpu=True)
    gpu = device.type == "cuda"
    constants = H200
    if gpu:
        constants = device_constants(torch.cuda.current_device() if device.index is None else device.index)
    spec = cases[0].spec
    usual = Case(spec, cases[0].intermediate, cost.USUAL_TOKENS).shape(weights)
    width = cost.best_width(usual, constants)
    try:
        rows = [_explained(case, width, constants, weights) for case in cases]
    except ValueError as error:
        raise DLRError(f"the kernels cannot run {spec} on {spec.hidden_size} features: {error}") from error
    return {
        "schema": 1,
        "device": asdict(constants),
        "assumed": not gpu,
        "chain": spec.to_dict() | {"intermediate": cases[0].intermediate, "params": spec.params},
        "dtype": dtype_name(weights),
        "gram": {"m": width, "S": width // spec.rank, "bytes": cost.gram_bytes(usual, width)},
        "rows": rows,
    }


def _explained(case: Case, width: int, device: Device, dtype: torch.dtype) -> dict[str, Any]:
    """The prediction of each path for one case, `decode` None where it cannot run, and which one is chosen."""
    shape = case.shape(dtype)
    steps = width // shape.rank
    plan = plan_decode(shape, device)
    decode = None
    if plan is not None:
        launch = {"ctas": plan.ctas, "num_warps": plan.num_warps}
        decode = _times(cost.predict_decode(shape, plan, device)) | launch
    return {
        "tokens": case.tokens,
        "floor_us": 1e6 * cost.floor_seconds(shape, device),
        "dense": _times(cost.predict_dense(shape, case.intermediate, device)),
        "decode": decode,
        "prefill": _times(cost.predict_prefill(shape, width, device)) | {"m": width, "S": steps},
        "choice": "prefill" if cost.choose(shape, device, steps) is None else "decode",
    }


def _times(prediction: Prediction) -> dict[str, Any]:
    return {
        "predicted_us": 1e6 * prediction.seconds, "floor_us": 1e6 * prediction.floor,
        "rounds": prediction.rounds, "launches": prediction.launches,
    }  # fmt: skip
