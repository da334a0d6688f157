"""A step of a whole model as an engine of transformers runs it, and how exact a locked model's is."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from dlr_lock.audit.strategies.model import replaced
from dlr_lock.microbench.bench import error_limit
from dlr_lock.runtime import DLRNet, locked_modules
from dlr_lock.triton_kernels import backend, chain_reference

KEPT = 64  # of a prefill's last positions, whose logits are compared


@torch.no_grad()
def decode_step(model: PreTrainedModel, batch: int, context: int) -> Callable[[], Tensor]:
    """A step that decodes one token of each of `batch` sequences behind `context` others: logits [batch, vocabulary].

    As `generate` does it with a static cache: the mask is made outside, positions are tensors, and nothing waits for
    the device, so that a CUDA graph can hold it. Every call is at the same position.
    """
    device = model.device
    ids = _ids(model, batch, context + 1)
    cache = StaticCache(config=model.config, max_cache_len=context + 8)
    model(input_ids=ids[:, :context], past_key_values=cache, use_cache=True, logits_to_keep=1)
    # The layers count their tokens one by one, and a step counts on: as views of one tensor one kernel sets them back.
    lengths = torch.empty(len(cache.layers), dtype=torch.int64, device=device)
    for number, layer in enumerate(cache.layers):
        layer.cumulative_length = lengths[number]
    mask = (torch.arange(context + 8, device=device) <= context).expand(batch, 1, 1, -1)
    positions = torch.full((batch, 1), context, device=device)
    last = ids[:, context:].clone()

    def step() -> Tensor:
        lengths.fill_(context)
        output = model(
            input_ids=last, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return output.logits[:, -1]

    return step


def prefill_step(model: PreTrainedModel, tokens: int) -> Callable[..., Tensor]:
    """A pass over one sequence of `tokens` tokens; logits of its last positions: keep (default 1)."""
    ids = _ids(model, 1, tokens)

    def step(keep: int = 1) -> Tensor:
        # With a cache transformers does not look at the positions, which would wait for the device.
        return model(input_ids=ids, use_cache=True, logits_to_keep=keep).logits[0]

    return step


@torch.no_grad()
def errors(model: PreTrainedModel, step: Callable[[], Tensor], got: Tensor) -> tuple[float, float, float]:
    """(error of the logits `got`, error of the chains step by step, limit), each an RMS over an RMS.

    Against the same step with the chains' products in float32 (float64 for float32 weights). The limit is that of the
    kernels' table, `error_limit`.
    """
    with exact(model):
        wanted = step().double()
    with backend("naive"):
        naive = _error(step(), wanted)
    return _error(got, wanted), naive, error_limit(naive, model.dtype)


@contextmanager
def exact(model: PreTrainedModel) -> Iterator[None]:
    """The chains in twice the precision of their weights, within the block."""
    with ExitStack() as stack:
        for _, net in locked_modules(model):
            stack.enter_context(replaced(net, _wide(net)))
        yield


def _wide(net: DLRNet) -> Callable[[Tensor], Tensor]:
    dtype = torch.float64 if net.dlr_A.dtype == torch.float32 else torch.float32

    def forward(x: Tensor) -> Tensor:
        return chain_reference(x.to(dtype), net.chain.to(dtype)).to(x.dtype)

    return forward


def _error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).square().mean() / wanted.square().mean()).sqrt().item()


def _ids(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    source = torch.Generator().manual_seed(2)
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=source).to(model.device)
