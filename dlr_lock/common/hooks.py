"""Watching a model run: hooks that go when they have served, passes that end early, and modes that come back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import DLRError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


class StopForward(Exception):
    """Raised in a hook: all that was wanted of this pass is there."""


@contextmanager
def removed(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    """Removes the hooks when the block ends, whatever ends it."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own modes come back at the end.

    no_grad, not inference_mode: what a model stores during the pass (rotary tables that grow) must stay
    usable in a later training step.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def is_paired(model: nn.Module) -> bool:
    """Whether a model is an encoder and a decoder, each of which reads a text."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def text_inputs(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """What a model is called with to read a text.

    An encoder-decoder's encoder reads it, and so does its decoder, one token late, as in a text that it gives back:
    every MLP sees every token, each as often.

    Args:
        model: Any transformers model.
        ids: [b, n] int64.

    Returns:
        Arguments by name, on the model's device.
    """
    ids = ids.to(model.device)
    if not is_paired(model):
        return {"input_ids": ids}
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    known = (getattr(model.config, name, None) for name in names)
    start = next((token for token in known if isinstance(token, int)), 0)
    late = torch.cat([ids.new_full((len(ids), 1), start), ids[:, :-1]], 1)
    return {"input_ids": ids, "decoder_input_ids": late}


def run_body(model: PreTrainedModel, ids: Tensor) -> Any:
    """The model's body on ids [b, n], without a cache; of a model with a head, no logits are worked out."""
    body = model.base_model
    options = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    return body(**text_inputs(model, ids), **options)


def watch_pass(model: PreTrainedModel, ids: Tensor, hooks: Sequence[RemovableHandle]) -> None:
    """One pass of the body without gradients that a hook may end by StopForward; the hooks are removed after it."""
    with removed(hooks), frozen(model), suppress(StopForward):
        run_body(model, ids)


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module was called with first, by position or by name; None where it was called with nothing."""
    return args[0] if args else next(iter(kwargs.values()), None)


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of that name. Raises DLRError where the model has none."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise DLRError(f"the model has no module {name}") from error
