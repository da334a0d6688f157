"""Compiling: torch.compile fuses what is elementwise, and decides by a minimum cut what to keep and what to redo."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.exc
from torch import Tensor

from ...common.errors import DLRError


def compiled(function: Callable[..., Tensor], *, memory_budget: float = 1.0) -> Callable[..., Tensor]:
    """The same function as one graph for each shape. The first call takes seconds to minutes, growing with the depth.

    Args:
        function: What is compiled.
        memory_budget: torch's `activation_memory_budget`: the share, of what plain autograd would keep, that may be
            kept; below 1 products are computed once more.
    """

    from torch._inductor.compile_fx import compile_fx  # 2 s, which `import dlr_lock` should not cost

    # A backend of its own, without which torch takes what it compiled of this function with another budget.
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        with torch._functorch.config.patch(activation_memory_budget=memory_budget):
            return compile_fx(graph, inputs)

    return torch.compile(function, backend=backend, dynamic=False, fullgraph=True)


@contextmanager
def compiler_errors() -> Iterator[None]:
    """A block in which torch.compile may fail: on a CPU it wants a C++ compiler.

    The backward pass is compiled when it first runs, so that belongs within, too.

    Raises:
        DLRError: With the reason, where it fails.
    """
    try:
        yield
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DLRError(f"torch.compile failed, so there is no compiled row: {reason}") from error
