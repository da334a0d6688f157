"""What the terms in headings mean: one text for the model card, the terminal and the page."""

from collections.abc import Iterable

from .section import Section

TERMS = {
    "chain": "lanes x steps x rank, and the activation: 1x12x192 is one chain of 12 steps of rank 192",
    "relative error": "mean over held-out tokens of |chain - target|^2 / |target|^2",
    "first tokens": "the relative error on the first tokens of sequences, which carry some models' largest activations",
    "flatten gap": "how far a chain is from its own flattened form, an MLP whose units all read the chain's input: the "
    "mean of |flattened - chain|^2 over |target|^2, or over |chain|^2 where it is measured in the locked model",
    "coupling": "RMS of a chain's updates over RMS of its input; a chain that moves its state by little is nearly flat",
    "hidden states": "relative error of the hidden states behind the layer, with all that was locked before it",
    "redistillation": "the best attack known to us on a single module: an MLP, the student, is fitted to the chain. "
    "Given are the student's relative error and its training tokens over those of the module's conversion; the chain "
    "is undone where the student is as good as the chain",
    "training tokens": "tokens that a module was trained on, one counted each time",
    "loss gap": "the loss on held-out text, in nats a token, over the original's",
    "KL": "the divergence of the next token's distribution from the original's, in nats a token",
    "flips": "how often the likeliest next token is another than the original's",
    "state error": "relative error of the last hidden states",
    "cosine": "between the mean-pooled last hidden states of a sequence and the original's, the mean over sequences",
    "variant": "the model that is fine-tuned: the original, the locked one, or the locked one whose chains were "
    "redistilled into MLPs, with the share of the conversion's training tokens that this took",
    "strategy": "a way to work out the same gradient, such as recomputing, inverting or look-ahead",
    "peak": "bytes of activations and gradients at the peak; weights and the optimizer's state are left out",
    "held": "bytes of activations kept from forward to backward",
    "launches": "operations started",
    "dependent": "the longest run of launches in which each waits for the one before",
    "forward": "the chain's inference: step by step (reference), or as the runtime runs it (runtime)",
}


def legend(sections: Iterable[Section], *, details: bool = True) -> Section:
    """The terms in the sections' headings, explained once each; without title and notes where there are none.

    Args:
        sections: All that is shown together.
        details: Whether folded tables are shown, too.
    """
    used: set[str] = set()
    for section in sections:
        tables = [section.table, *(section.details if details else ())]
        used |= {
            *section.terms,
            *(column for t in tables if t is not None and t.rows for column in t.columns),
        }
    notes = [f"{term}: {words}." for term, words in TERMS.items() if term in used]
    return Section("Terms" if notes else "", notes=notes)
