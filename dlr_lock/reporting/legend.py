"""What the terms in headings mean: one text for the model card, the terminal and the page."""

from collections.abc import Iterable

from .section import Section

TERMS = {
    "chain": "lanes x steps x rank, and the activation: 1x12x192 is one chain of 12 steps of rank 192",
    "relative error": "mean over held-out tokens of |chain - target|^2 / |target|^2, a token counting for 1 at most",
    "first tokens": "the relative error, unbounded, on the first tokens of sequences, which carry some models' largest "
    "activations",
    "flatten gap": "how far a chain is from its own flattened form, an MLP whose units all read the chain's input: the "
    "mean of |flattened - chain|^2 over |target|^2, or over |chain|^2 where it is measured in the locked model",
    "coupling": "RMS of a chain's updates over RMS of its input; a chain that moves its state by little is nearly flat",
    "hidden states": "relative error of the hidden states behind the layer, with all that was locked before it",
    "verdict": "whether a chain is a lock, by the figure that decides. The best attack known to us on a single module "
    "is redistillation: the student, an MLP of the chain's size or two wide steps, is fitted to it. 'locked, 1.43 at "
    "0.25x': with 0.25 times the training tokens of the conversion the student's error was 1.43 times the chain's, "
    "both against the chain's target; 'untrained' instead: linear regression alone made one or two wide steps of the "
    "chain. Three are NOT LOCKED: EMPTY, for the relative error is above 0.9, so that there "
    "is no MLP to give back; FLAT, for the flatten gap is below 0.5, so that flattening gives it back; UNDONE, for the "
    "error of one of these is 1.05 of the chain's or less. not attacked: it is not known",
    "undoing / conversion": "training tokens of the best student that starts from the chain's weights, until its error "
    "is 1.05 times the chain's, over those of the conversion; 0 where regression alone suffices. 'at most' and 'more "
    "than', where fewer or more were not tried",
    "undoing / fresh": "the same over those of a fresh MLP that knows the chain's outputs alone; at 1 knowing the "
    "weights would help nothing",
    "training tokens": "tokens that a module was trained on, one counted each time",
    "loss": "how badly the next token of a text is foretold: the cross entropy, in nats a token",
    "perplexity": "e to the loss: among so many equally likely tokens the model is in doubt",
    "loss gap": "the loss on held-out text, in nats a token, over the original's",
    "KL": "the divergence of the next token's distribution from the original's, in nats a token",
    "flips": "how often the likeliest next token is another than the original's",
    "answers flipped": "questions that one of the two models answers rightly and the other wrongly",
    "lost": "questions that only the original answers rightly",
    "gained": "questions that only the locked model answers rightly",
    "neutral": "the loss on text that is not of the task, before and after a fine-tune",
    "gradient's error": "|gradient - the original's|^2 over |the original's|^2; of a module the mean over tokens, "
    "a token counting for 1 at most",
    "gradient's cosine": "between the gradient and the original's, of a module the mean over tokens",
    "value's error": "the relative error of what the chain gives, against the original's MLP at the same input",
    "gain": "the original's loss on the task before any training, minus the attack's at the end",
    "fine-tunes": "how many fine-tunes share what a redistillation cost",
    "initialisation": "what the student starts from: linear and flat are read off the chain, random is not",
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
    "provider": "what fills the MLP's place: dense is the MLP itself, naive the chain step by step, the others its "
    "fast forms",
    "error": "relative error: of a student against the chain's target, of a benchmark against float64",
    "us": "microseconds a call",
    "p20 to p80": "how far the times of calls lie apart, over their median",
    "to dense": "the time over the MLP's",
    "copy rate": "bytes that must be read, a second, over what a plain copy reaches on this machine",
    "product rate": "arithmetic a second, over what a plain matrix product reaches on this machine",
    "forecast us": "what the cost model says, in microseconds",
    "path": "how the place is computed: dense is the MLP itself, decode the chain in one launch, prefill in three "
    "launches a round",
    "choice": "the path that the runtime takes",
    "floor us": "microseconds that reading the weights once and doing the products must take: no kernel is faster",
    "rounds": "how often a block of steps is done in all lanes, one after another",
    "m": "columns of a block: S steps of the chain's rank, done together",
    "S": "steps of a block",
    "CTAs a lane": "groups of a GPU's threads that share one lane",
    "warps": "32 threads each, of such a group",
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
