"""Stage `conversion`: a model is locked, as many layers and training tokens as there is time for, and compared.

Without --model the model is one of random weights and SmolLM2-135M's sizes, of fewer layers: the speed is real, the
fidelity is that of an MLP without structure, and every row says so. Without --data the text is Python's help topics.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from dlr_lock.convert import ConversionReport, convert_model
from dlr_lock.convert.config import EFFORTS
from dlr_lock.convert.data import english_topics
from dlr_lock.convert.evaluate import Evaluation
from dlr_lock.convert.mlp_discovery import middle

from . import build
from .rows import ConversionRow
from .stage import Record

RANDOM_LAYERS = 6
_SHARE = 0.7  # of the time left, that a forecast conversion may fill
_TEXT = "Python's help topics"
_BYTES = 5.0  # of a text that make a token, at most: Python's help topics have 4.0, other prose up to 4.8


def measure(record: Record) -> None:
    """A first conversion of one layer, then one of as many as its speed promises time for."""
    with TemporaryDirectory() as scratch:
        source, layers = _source(record, Path(scratch))
        for name in record.unmeasured(("one layer", "all that fits"), lambda name: {"name": name}):
            count, train_tokens = 1, 2048 if record.smoke else EFFORTS["quick"].train_tokens
            if name != "one layer":
                first = next(row for row in record.rows if row["name"] == "one layer")
                if record.smoke:
                    count = layers
                else:
                    seconds = _SHARE * record.left()
                    count, train_tokens = plan(layers, first["train_tokens_per_s"], first["seconds"], seconds)
            if not count:
                record.stop("after 1 of 2: the limit of time")
                return
            record.add(_convert(record, source, Path(scratch) / name, name, layers, count, train_tokens))


def plan(layers: int, rate: float, first_seconds: float, seconds: float) -> tuple[int, int]:
    """(layers, training tokens of a module) that fit in `seconds`: as many layers as get the tokens of
    effort quick, each with what is left, up to those of standard on a GPU.

    rate: training tokens a second. first_seconds: of the first conversion, of which what was no distillation is taken
    to return, half of it with every layer.
    """
    least, most = EFFORTS["quick"].train_tokens, 20 * EFFORTS["standard"].train_tokens
    fixed = max(0.0, first_seconds - least / rate)
    a_layer = fixed / 2
    count = min(layers, int((seconds - fixed) / (a_layer + least / rate)))
    if count < 1:
        return 0, 0
    train_tokens = int(rate * ((seconds - fixed) / count - a_layer))
    return count, min(most, max(least, train_tokens // 512 * 512))


def _convert(
    record: Record, source: Path, out: Path, name: str, layers: int, count: int, train_tokens: int
) -> ConversionRow:
    """Locks the middle `count` layers."""
    data = record.options.data or source.parent / "topics.txt"
    if not data.exists():
        data.write_text(english_topics(), encoding="utf-8")
    sizes = {"tokens": 2048, "heldout": 512, "batch": 256, "sequence": 64} if record.smoke else _tokens(data)
    report: ConversionReport = convert_model(
        source, out, layers=middle(range(layers), count), train_tokens=train_tokens, data=str(data), redistill=0.0,
        end_to_end=0, device=str(record.device), progress=lambda what, done, total: record.alive(what), **sizes,
    )  # fmt: skip
    evaluation = report.evaluation
    assert isinstance(evaluation, Evaluation) and evaluation.original_loss is not None
    assert evaluation.kl is not None and evaluation.flips is not None
    given = record.options.model
    fits = [module.fidelity for module in report.modules]
    return ConversionRow(
        name=name,
        model=given.name if given else f"random weights, {source.name}",
        random=given is None,
        text=record.options.data.name if record.options.data else _TEXT,
        layers=count,
        of_layers=layers,
        tokens=int(report.options["tokens"]),
        train_tokens=train_tokens,
        seconds=report.seconds,
        original_loss=evaluation.original_loss,
        loss=evaluation.loss,
        kl=evaluation.kl,
        flips=evaluation.flips,
        smallest_gap=min(fit.flatten_gap for fit in fits),
        largest_rel_error=max(fit.rel_error for fit in fits),
        train_tokens_per_s=train_tokens * count / sum(module.seconds for module in report.modules),
    )


def _tokens(data: Path) -> dict[str, int]:
    """What a text certainly has, where its size tells; {} for the effort's own."""
    if data.suffix != ".txt":
        return {}
    tokens = min(8 * EFFORTS["standard"].tokens, int(data.stat().st_size / _BYTES))
    return {"tokens": tokens * 9 // 10, "heldout": max(512, min(10_240, tokens // 10))}


def _source(record: Record, scratch: Path) -> tuple[Path, int]:
    """The model to convert, and how many layers it has; raises DLRError in the conversion where it is none."""
    given = record.options.model
    if given is not None and given.is_dir():
        return given, AutoConfig.from_pretrained(given).get_text_config().num_hidden_layers
    if given is not None:  # a .gguf file
        config = AutoConfig.from_pretrained(given.parent, gguf_file=given.name)
        return given, config.get_text_config().num_hidden_layers
    shape = build.TINY[0] if record.smoke else build.SHAPES[0]
    layers = 2 if record.smoke else RANDOM_LAYERS
    tokenizer = _tokenizer(shape.vocabulary if record.smoke else 4096)
    folder = scratch / f"{shape.name}'s sizes"
    model = build.original(shape, torch.float32, torch.device("cpu"), layers)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, layers


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte pairs of the help topics."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        english_topics()[:200_000].split("\n\n"),
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
