"""What many attacked models are compared with, on one text: a model whose body runs once."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..common.hooks import frozen, run_body, text_inputs
from ..common.progress import Count, no_count
from ..convert.evaluate import Evaluation, StateEvaluation, compare, pass_by_pass
from .strategies.model import replaced


class Reference:
    """A model and a text. What the body gives is kept, [S, n, d], and the head runs on it for every comparison: of
    SmolLM2 that is a fifth of a pass. Where the model has no body of its own, the whole runs each time."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor) -> None:
        """model: as it stays. tokens: [S, n] int64."""
        self._model, self._tokens = model, tokens
        self._states: list[Any] = []  # of the batches of `compare`, which are the same every time

    def compare(self, model: PreTrainedModel, progress: Count = no_count) -> Evaluation | StateEvaluation:
        """How far another model is from this one, see `convert.evaluate.compare`."""
        passes = partial(pass_by_pass, model), self._pass_by_pass
        return compare(model, self._model, self._tokens, progress, passes)

    def _pass_by_pass(self, tokens: Tensor, at_once: int) -> Iterator[Any]:
        model, body = self._model, self._model.base_model
        if body is model:
            yield from pass_by_pass(model, tokens, at_once)
            return
        for number, ids in enumerate(tokens.split(at_once)):
            with frozen(model):
                if number == len(self._states):
                    self._states.append(run_body(model, ids))
                kept = self._states[number]
                with replaced(body, lambda *_, kept=kept, **__: kept):
                    output = model(**text_inputs(model, ids))
            yield output
