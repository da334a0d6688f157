"""What a locked model still does: loss on held-out text, and how far it is from the original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.errors import DLRError
from ..common.hooks import frozen, is_paired, run_body, text_inputs
from ..common.micro_batch import MicroBatch
from ..common.progress import Count, no_count
from ..runtime import DLRNet
from ..triton_kernels import chain_reference, flattened_reference, lane_updates
from .parallel.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_ROWS = 4096  # tokens at a time
Passes = Callable[
    [Tensor, int], Iterator[Any]
]  # a model's outputs for [S, n] int64, so many sequences a batch


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How one locked module does on held-out tokens.

    Attributes:
        rel_error: Mean over tokens of |chain - target|^2 / |target|^2, see `mean_error`.
        flatten_gap: Mean over tokens of |flattened chain - chain|^2 / |target|^2.
        coupling: RMS of the lanes' updates over RMS of x.
        first_error: The relative error of sequences' first tokens alone, whatever its size, None where there are none;
            these carry the massive activations of some models.
    """

    rel_error: float
    flatten_gap: float
    coupling: float
    first_error: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """The fields by name, fit for JSON."""
        return asdict(self)


@torch.no_grad()
def measure(
    net: DLRNet,
    x: Tensor,
    y: Tensor,
    device: torch.device,
    first: Tensor | None = None,
    ranks: Ranks = ALONE,
    micro: MicroBatch | None = None,
) -> Fidelity:
    """Compares a chain, with its weights as stored but in float32, with its MLP on held-out tokens.

    Args:
        net: The chain.
        x: [N, d], the MLP's input.
        y: [N, d], its output.
        device: Where the chain is run.
        first: [N] bool, which tokens are the first of their sequences; None where that is not asked.
        ranks: Who else has such tokens; the figures are of all of them.
        micro: How many tokens the device takes at once; None to learn it here.
    """
    weights = net.chain.to(device, torch.float32)
    errors = [torch.zeros(0)]
    gap = update = size = 0.0

    def some(rows: slice) -> None:
        nonlocal gap, update, size
        xb, yb = (t[rows].to(device, torch.float32) for t in (x, y))
        chain = chain_reference(xb, weights)
        flat = flattened_reference(xb, weights)
        error = relative_error(chain, yb).cpu()
        sums = (
            (flat - chain).square().sum(1) / size_of(yb),
            lane_updates(xb, weights).square().mean(0),
            xb.square(),
        )
        a, b, c = (part.sum().item() for part in sums)  # all of them before any is added
        gap, update, size = gap + a, update + b, size + c
        errors.append(error)

    (micro or MicroBatch("the measuring of chains", "token")).each(some, len(x), _ROWS)
    error = torch.cat(errors).double()
    firsts = error[first] if first is not None else error[:0]
    total, gap, update, size, tokens, of_first, starts = ranks.total(
        _bounded(error).sum().item(), gap, update, size, len(x), firsts.sum().item(), len(firsts)
    )
    return Fidelity(
        total / tokens,
        gap / tokens,
        math.sqrt(update / size) if size else 0.0,
        of_first / starts if starts else None,
    )


def mean_error(errors: Tensor) -> float:
    """The mean of tokens' relative errors [T], where none counts for more than 1, as nothing in the MLP's place would.

    Without that bound one token in 512 can be the whole figure: of layer 12 of SmolLM2 behind layer 11's chain,
    measured against its MLP, the mean was 324, for the first tokens' 164,000 and 0.32 elsewhere. Where nothing of the
    kind happens the bound changes little: one token in 10,000 is beyond 1, and 0.261 becomes 0.259.
    """
    return _bounded(errors).mean().item()


def _bounded(errors: Tensor) -> Tensor:
    return errors.clamp(max=1)


def relative_error(y: Tensor, wanted: Tensor) -> Tensor:
    """|y - wanted|^2 / |wanted|^2 for every token: [T, d], [T, d] -> [T]."""
    return (y - wanted).square().sum(1) / size_of(wanted)


def size_of(wanted: Tensor) -> Tensor:
    """|wanted|^2 of every token, [T, d] -> [T]; a token without output counts as one of a millionth of the mean."""
    size = wanted.square().sum(1)
    return size.clamp(min=1e-6 * size.mean().clamp(min=1e-30))


BATCH = 8  # sequences in a pass
# Float32 logits of one forward pass stay below this where one sequence allows it (SmolLM2: 100 MB each).
_LOGIT_BYTES = 256 * 2**20


def sequences_at_once(length: int, vocabulary: int, most: int) -> int:
    """How many sequences of so many tokens one pass with logits takes, for a vocabulary: from 1 to `most`."""
    return max(1, min(most, _LOGIT_BYTES // (4 * length * vocabulary)))


def elements_at_once(device: torch.device) -> int:
    """Elements (positions x vocabulary) whose softmax is taken at once: on a CPU what its caches hold, 4 MiB in
    float32, elsewhere 64 MiB. The loss of 1,024 positions of 49,152 tokens takes 0.40 s so on two cores, 0.65 s with
    four times as many elements."""
    return 2**20 if device.type == "cpu" else 2**24


@dataclass(frozen=True)
class Evaluation:
    """Figures over predicted tokens: every token but the first of each sequence.

    Attributes:
        loss, original_loss: Cross entropy in nats a token; the original's is None where none was given, as are all
            fields that follow from it.
        perplexity, original_perplexity: Their exponentials.
        tokens: How many were predicted.
        loss_gap: loss - original_loss.
        kl: Mean KL(original || model), in nats.
        flips: Share of positions whose likeliest next token differs, 0 to 1.
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


def pooled(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Several texts' figures as one: means over all of their tokens. All with an original, or none."""
    tokens = sum(e.tokens for e in evaluations)

    def mean(name: str) -> float | None:
        values = [getattr(e, name) for e in evaluations]
        if any(value is None for value in values):
            return None
        return sum(value * e.tokens for value, e in zip(values, evaluations, strict=True)) / tokens

    loss, original = mean("loss"), mean("original_loss")
    assert loss is not None
    return Evaluation(
        loss=loss,
        perplexity=_perplexity(loss),
        tokens=tokens,
        original_loss=original,
        original_perplexity=None if original is None else _perplexity(original),
        loss_gap=mean("loss_gap"),
        kl=mean("kl"),
        flips=mean("flips"),
    )


@dataclass(frozen=True)
class StateEvaluation:
    """How far a model without a language-model head is from its original.

    Attributes:
        state_error: Mean over tokens of |locked - original|^2 / |original|^2 of the last hidden states.
        cosine: Mean over sequences of the cosine between their mean-pooled last hidden states.
        tokens: How many tokens that is over.
    """

    state_error: float
    cosine: float
    tokens: int

    def to_dict(self) -> dict[str, float | int]:
        """The fields by name, fit for JSON."""
        return asdict(self)


def evaluate(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    original: PreTrainedModel | None = None,
    batch: int = BATCH,
    progress: Count = no_count,
    passes: tuple[Passes, Passes] | None = None,
) -> Evaluation:
    """Next-token cross entropy of a model on a text, and its distance to the original. Softmax in float32, sums in
    float64.

    Args:
        model: A causal language model.
        tokens: [S, n] int64.
        original: What it is compared with, None for nothing.
        batch: The largest number of sequences in a pass; fewer are taken where their logits exceed 256 MiB.
        progress: Called with (sequences done, S).
        passes: How the model's and the original's outputs come about, where not by a pass of each batch.

    Raises:
        DLRError: On tokens with nothing to predict, a model without a language-model head, two models with different
            vocabularies, and a loss that is not finite.
    """
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise DLRError(
            f"nothing to evaluate in tokens of shape {list(tokens.shape)}: give sequences of 2 or more"
        )
    sequences, n = tokens.shape
    at_once = sequences_at_once(n, vocabulary(model), batch)
    loss = original_loss = kl = 0.0
    flips = 0
    runs = passes or (partial(pass_by_pass, model), partial(pass_by_pass, original))
    ours = runs[0](tokens, at_once)
    theirs = None if original is None else runs[1](tokens, at_once)
    progress(0, sequences)
    for begin in range(0, sequences, at_once):
        ids = tokens[begin : begin + at_once]
        logits = _logits(next(ours), ids, model)  # [T, V]
        targets = ids[:, 1:].reshape(-1).to(logits.device)  # [T]
        reference = None
        if theirs is not None and original is not None:
            reference = _logits(next(theirs), ids, original).to(logits.device)
        if reference is not None and reference.shape != logits.shape:
            raise DLRError(
                f"the two models have different vocabularies ({logits.shape[-1]} and {reference.shape[-1]} "
                "tokens): is this the original of the locked model?"
            )
        step = max(1, elements_at_once(logits.device) // logits.shape[-1])
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
    progress: Count = no_count,
    passes: tuple[Passes, Passes] | None = None,
    micro: MicroBatch | None = None,
) -> Evaluation | StateEvaluation:
    """`evaluate` where the model predicts the next token, `evaluate_states` where it does not; with smaller batches
    where the device's memory does not hold these."""

    def figures(batch: int) -> Evaluation | StateEvaluation:
        if not predicts_next(original):
            return evaluate_states(model, tokens, original, batch=batch, progress=progress)
        return evaluate(model, tokens, original=original, batch=batch, progress=progress, passes=passes)

    return (micro or MicroBatch("the measuring of the model", "sequence")).fit(figures, BATCH)


def evaluate_states(
    model: PreTrainedModel,
    tokens: Tensor,
    original: PreTrainedModel,
    *,
    batch: int = BATCH,
    progress: Count = no_count,
) -> StateEvaluation:
    """Last hidden states of two models on a text, compared.

    Args:
        model, original: The two.
        tokens: [S, n] int64.
        batch: Sequences in a pass.
        progress: Called with (sequences done, S).

    Raises:
        DLRError: Where they are not finite.
    """
    error, cosine = 0.0, 0.0
    for begin in range(0, len(tokens), batch):
        ids = tokens[begin : begin + batch]
        with frozen(model), frozen(original):
            got, wanted = (run_body(m, ids)[0].float().cpu() for m in (model, original))
        error += relative_error(got.flatten(0, 1), wanted.flatten(0, 1)).double().sum().item()
        cosine += torch.cosine_similarity(got.mean(1), wanted.mean(1)).double().sum().item()
        progress(min(begin + batch, len(tokens)), len(tokens))
    if not math.isfinite(error):
        raise DLRError("the hidden states contain NaN or infinity: are the model's weights sound?")
    return StateEvaluation(error / tokens.numel(), cosine / len(tokens), tokens.numel())


def pass_by_pass(model: PreTrainedModel, tokens: Tensor, at_once: int) -> Iterator[Any]:
    """A model's outputs for tokens [S, n] int64, so many sequences a batch."""
    for ids in tokens.split(at_once):
        with frozen(model):  # not around the yield: it would be the caller's, too
            output = model(**text_inputs(model, ids))
        yield output


def _logits(output: Any, ids: Tensor, model: PreTrainedModel) -> Tensor:
    """Logits of a model's output for every token but the first: [b * (n - 1), V], in the model's dtype, where it is."""
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise DLRError(f"{type(model).__name__} has no language-model head: its loss on text is not defined")
    # A decoder that was fed one token late says token t at place t, a language model token t + 1.
    return (logits[:, 1:] if is_paired(model) else logits[:, :-1]).flatten(0, 1)


def _cross_entropy(log_probs: Tensor, targets: Tensor) -> float:
    return -log_probs.gather(-1, targets[:, None]).double().sum().item()


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of every row, [T, V], [T, V] -> [T]; a token that p rules out (log 0) counts nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


class MeanDivergence(torch.autograd.Function):
    """Mean KL(p || q) over positions: `MeanDivergence.apply(wanted, got)`, logits [T, V] each in float32, whose softmax
    p and q are.

    Only `got` has a gradient, (q - p) / T. It is made with the loss, some positions at a time: by autograd the two took
    four times as long, a sixth of a step of SmolLM2's end-to-end phase.
    """

    @staticmethod
    def forward(ctx: Any, wanted: Tensor, got: Tensor) -> Tensor:
        slope, sums = torch.empty_like(got), []
        rows = max(1, elements_at_once(got.device) // got.shape[1])
        for p, q, s in zip(wanted.split(rows), got.split(rows), slope.split(rows), strict=True):
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            sums.append(divergence(log_p, log_q).sum())
            torch.sub(log_q.exp_(), log_p.exp_(), out=s)
        ctx.save_for_backward(slope)
        return torch.stack(sums).sum() / len(got)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (slope,) = ctx.saved_tensors
        return None, slope * (gradients[0] / len(slope))


def vocabulary(model: PreTrainedModel) -> int:
    """Tokens that the model knows: the width of its logits, where it has any."""
    head = model.get_output_embeddings()
    return model.get_input_embeddings().num_embeddings if head is None else head.weight.shape[0]


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
