"""What an audit reads: a benign task to fine-tune on, and neutral text; each is bundled, or any text of the user's."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..common.errors import DLRError
from ..common.splits import hold_out
from ..convert.data import english_topics, read_text
from .config import INVENTED, TOPICS

_CHARACTERS = 12  # of a line for each token wanted, at least: tokenizers take 2 to 6 a token
_HELD = 8  # one sequence of so many is held out

_WHO = "miller weaver sailor farmer baker hunter singer child judge smith nurse guard"
_HOW = "old young tired happy quiet clever angry patient"
_DOES = "carries finds sells hides breaks paints forgets wants"
_WHAT = "water bread stone lamp rope letter basket knife apple drum coat coin"
_WHERE = "bridge river forest market tower garden harbour kitchen"


@dataclass(frozen=True, eq=False)
class Text:
    """A text in a model's tokens, in sequences of n.

    Attributes:
        train: To train on, [S, n] int64.
        heldout: To judge by, [H, n] int64; no sequence is in both.
        source: What the text is, in words.
    """

    train: Tensor
    heldout: Tensor
    source: str


def read_split(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    tokens: int,
    heldout_tokens: int,
    sequence_length: int,
    seed: int = 0,
) -> Text:
    """Reads a text and splits it.

    Args:
        source: 'invented' (see `invented_lines`), 'topics' (Python's own documentation, 115,000 tokens), or a text as
            `convert.data.read_text` takes it.
        tokenizer: Of the model; None where it has none.
        tokens, heldout_tokens: How many are wanted at most, to train on and to judge by; a shorter text gives less of
            both.
        sequence_length: Tokens of a sequence.
        seed: Of the invented sentences.

    Raises:
        DLRError: Where the text cannot be read or gives fewer than two sequences.
    """
    bundled: dict[str, tuple[str, Callable[[], str]]] = {
        INVENTED: (
            "an invented language",
            lambda: "\n".join(invented_lines((tokens + heldout_tokens) * _CHARACTERS, seed)),
        ),
        TOPICS: ("Python's help topics", english_topics),
    }
    with TemporaryDirectory() as folder:
        name, path = Path(source).name, source
        if source in bundled:
            name, write = bundled[source]
            path = str(Path(folder) / "text.txt")
            Path(path).write_text(write(), encoding="utf-8")
        return _split(path, tokenizer, tokens, heldout_tokens, sequence_length, name)


def invented_lines(characters: int, seed: int) -> Iterator[str]:
    """Lines of the form "English sentence = its translation", into an invented language.

    It has its own word for each English one, puts the verb last and agrees the adjective with its noun by the noun's
    last letter: words and rule can be learnt, and are in no other text. The words are always the same.

    Args:
        characters: How many the lines have in all; a few more.
        seed: Of the sentences.
    """
    words = _lexicon()
    chooser = random.Random(seed)
    written = 0
    while written < characters:
        who, how, does, what, where = (chooser.choice(c.split()) for c in (_WHO, _HOW, _DOES, _WHAT, _WHERE))
        noun = words[who]
        line = (
            f"The {how} {who} {does} the {what} near the {where}. = "
            f"{noun.capitalize()} {words[how]}{noun[-1]} {words[where]}esh {words[what]} {words[does]}."
        )
        written += len(line) + 1
        yield line


def _lexicon() -> dict[str, str]:
    chooser = random.Random(1)
    english = " ".join((_WHO, _HOW, _DOES, _WHAT, _WHERE)).split()
    made: dict[str, None] = {}
    while len(made) < len(english):
        made["".join(chooser.choice("ktvmrlzd") + chooser.choice("aeiou") for _ in range(3))] = None
    return dict(zip(english, made, strict=True))


def _split(
    text: str,
    tokenizer: PreTrainedTokenizerBase | None,
    tokens: int,
    heldout_tokens: int,
    sequence_length: int,
    source: str,
) -> Text:
    ids = read_text(text, tokenizer, tokens=tokens + heldout_tokens, sequence_length=sequence_length)
    if len(ids) < 2:
        raise DLRError(
            f"{source}: {ids.numel()} tokens, of {tokens + heldout_tokens} asked for, are less than two sequences of "
            f"{sequence_length}"
        )
    kept = hold_out(len(ids), min(max(1, heldout_tokens // sequence_length), max(1, len(ids) // _HELD)))
    return Text(ids[~kept][: max(1, tokens // sequence_length)], ids[kept], source)
