"""What a locked model still does: loss on held-out text, and how far it is from the original."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime.errors import DLRError
from .fidelity import relative_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Float32 logits of one forward pass stay below this where one sequence allows it (SmolLM2: 100 MB each).
LOGIT_BYTES = 256 * 2**20
# Elements (positions x vocabulary) whose softmax is taken at once: 64 MiB in float32.
CHUNK = 16 * 2**20


@dataclass(frozen=True)
class Evaluation:
    """Figures over `tokens` predicted tokens (every token but the first of each sequence), in nats per token.

    The fields of the original are None where no original was given.
    kl: mean KL(original || model); flips: share of positions whose likeliest next token differs, 0 to 1.
    """

    loss: float
    perplexity: float
    tokens: int
    original_loss: float | None = None
    original_perplexity: float | None = None
    loss_gap: float | None = None
    kl: float | None = None
    flips: float | None = None

    def to_dict(self) -> dict[str, float | int | None]:
        """The fields by name, fit for JSON (a perplexity beyond every float becomes None)."""
        return {key: None if value == math.inf else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class StateEvaluation:
    """How far a model without a language-model head is from its original, over `tokens` tokens.

    state_error: mean over tokens of |locked - original|^2 / |original|^2 of the last hidden states; cosine: mean
    over sequences of the cosine between their mean-pooled last hidden states.
    """

    state_error: float
    cosine: float
    tokens: int

    def to_dict(self) -> dict[str, float | int]:
        """The fields by name, fit for JSON."""
        return asdict(self)


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


def run_body(model: PreTrainedModel, ids: Tensor) -> Any:
    """The model's body on ids [b, n], without a cache; of a model with a head, no logits are worked out."""
    body = model.base_model
    options = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    return body(input_ids=ids.to(model.device), **options)


def evaluate(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    original: PreTrainedModel | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Next-token cross entropy of `model` on tokens [S, n], and its distance to `original` if that is given.

    batch is the largest number of sequences in a pass; fewer are taken where their logits would not fit into
    256 MiB. progress is called with (sequences done, S). Softmax in float32, sums in float64.
    Raises DLRError for tokens with nothing to predict, for a model without a language-model head, for two
    models with different vocabularies, and for a loss that is not finite.
    """
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise DLRError(
            f"nothing to evaluate in tokens of shape {list(tokens.shape)}: give sequences of 2 or more"
        )
    sequences, n = tokens.shape
    at_once = max(1, min(batch, LOGIT_BYTES // (n * vocabulary(model) * 4)))
    loss = original_loss = kl = 0.0
    flips = 0
    if progress is not None:
        progress(0, sequences)
    for begin in range(0, sequences, at_once):
        ids = tokens[begin : begin + at_once]
        logits = _logits(model, ids)  # [T, V]
        targets = ids[:, 1:].reshape(-1).to(logits.device)  # [T]
        reference = None if original is None else _logits(original, ids).to(logits.device)
        if reference is not None and reference.shape != logits.shape:
            raise DLRError(
                f"the two models have different vocabularies ({logits.shape[-1]} and {reference.shape[-1]} "
                "tokens): is this the original of the locked model?"
            )
        step = max(1, CHUNK // logits.shape[-1])
        for at in range(0, len(targets), step):
            rows = slice(at, at + step)
            log_q = logits[rows].float().log_softmax(-1)
            loss += _cross_entropy(log_q, targets[rows])
            if reference is not None:
                log_p = reference[rows].float().log_softmax(-1)
                original_loss += _cross_entropy(log_p, targets[rows])
                kl += divergence(log_p, log_q).double().sum().item()
                flips += int((log_p.argmax(-1) != log_q.argmax(-1)).sum())
        if not math.isfinite(loss):
            raise DLRError(
                f"the model's loss is {loss}: its logits contain NaN or infinity; are its weights sound?"
            )
        if not math.isfinite(original_loss):
            raise DLRError(f"the original's loss is {original_loss}: its logits contain NaN or infinity")
        if not math.isfinite(kl):
            raise DLRError(
                f"the divergence from the original is {kl}: a token has no chance at all in the model"
            )
        if progress is not None:
            progress(min(begin + at_once, sequences), sequences)

    count = sequences * (n - 1)
    loss /= count
    if original is None:
        return Evaluation(loss=loss, perplexity=_perplexity(loss), tokens=count)
    original_loss /= count
    return Evaluation(
        loss=loss,
        perplexity=_perplexity(loss),
        tokens=count,
        original_loss=original_loss,
        original_perplexity=_perplexity(original_loss),
        loss_gap=loss - original_loss,
        kl=max(0.0, kl / count),  # rounding can leave a zero just below zero
        flips=flips / count,
    )


def predicts_next(model: PreTrainedModel) -> bool:
    """Whether the model gives chances for the next token, as a masked language model or a classifier does not."""
    return model.get_output_embeddings() is not None and model.can_generate()


def distance_of(evaluation: Evaluation | StateEvaluation) -> float:
    """How far the model is from its original: the KL, or the error of the last hidden states."""
    if isinstance(evaluation, StateEvaluation):
        return evaluation.state_error
    assert evaluation.kl is not None  # compared with an original
    return evaluation.kl


def compare(
    model: PreTrainedModel,
    original: PreTrainedModel,
    tokens: Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation | StateEvaluation:
    """`evaluate` where the model predicts the next token, `evaluate_states` where it does not."""
    if not predicts_next(original):
        return evaluate_states(model, tokens, original, progress=progress)
    return evaluate(model, tokens, original=original, progress=progress)


def evaluate_states(
    model: PreTrainedModel,
    tokens: Tensor,
    original: PreTrainedModel,
    *,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> StateEvaluation:
    """Last hidden states of two models on tokens [S, n], compared. Raises DLRError where they are not finite."""
    error, cosine = 0.0, 0.0
    for begin in range(0, len(tokens), batch):
        ids = tokens[begin : begin + batch]
        with frozen(model), frozen(original):
            got, wanted = (run_body(m, ids)[0].float().cpu() for m in (model, original))
        error += relative_error(got.flatten(0, 1), wanted.flatten(0, 1)).double().sum().item()
        cosine += torch.cosine_similarity(got.mean(1), wanted.mean(1)).double().sum().item()
        if progress is not None:
            progress(min(begin + batch, len(tokens)), len(tokens))
    if not math.isfinite(error):
        raise DLRError("the hidden states contain NaN or infinity: are the model's weights sound?")
    return StateEvaluation(error / tokens.numel(), cosine / len(tokens), tokens.numel())


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits for every token but the first: [b * (n - 1), V], in the model's dtype, on its device."""
    with frozen(model):
        output = model(input_ids=ids.to(model.device))
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise DLRError(f"{type(model).__name__} has no language-model head: its loss on text is not defined")
    return logits[:, :-1].flatten(0, 1)


def _cross_entropy(log_probs: Tensor, targets: Tensor) -> float:
    return -log_probs.gather(-1, targets[:, None]).double().sum().item()


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of every row, [T, V], [T, V] -> [T]; a token that p rules out (log 0) counts nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def vocabulary(model: PreTrainedModel) -> int:
    """Tokens that the model knows: the width of its logits, where it has any."""
    head = model.get_output_embeddings()
    return model.get_input_embeddings().num_embeddings if head is None else head.weight.shape[0]


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
