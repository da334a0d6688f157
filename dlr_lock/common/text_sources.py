"""Text as it comes from a file (.txt, .jsonl, .parquet) or a dataset that the `datasets` package can fetch.

All of it is streamed, so that a file of any size costs no more than the part that is used.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from .errors import DLRError, first_line

FILE_TYPES = (".txt", ".jsonl", ".parquet")
# Longest stretch handed to the tokenizer at once. Short enough that little is read in vain, long enough that
# a word split at a border (one in about 14,000 tokens) does not matter.
_PIECE = 65_536


def open_text(name: str) -> tuple[Iterator[Iterable[str]], str]:
    """The documents of a text, each an iterator of pieces, and the text's name for a message.

    Args:
        name: A .txt, .jsonl or .parquet file, or a dataset: name, name:split or name:config:split.

    Raises:
        DLRError: Here or while the documents are read, where the text cannot be had.
    """
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir():
        raise DLRError(f"{name} is a folder: give one text file ({', '.join(FILE_TYPES)})")
    if path.exists() and suffix not in FILE_TYPES:
        raise DLRError(f"{name}: cannot tell what kind of text this is; known are {', '.join(FILE_TYPES)}")
    if suffix == ".txt":
        return _text_file(path), path.name
    if suffix == ".jsonl":
        return (_pieces(StringIO(text)) for text in _jsonl_file(path)), path.name
    if suffix == ".parquet":
        return (_pieces(StringIO(text)) for text in _parquet_file(path)), path.name
    return (_pieces(StringIO(text)) for text in _dataset(name)), name


def check_there(name: str) -> None:
    """Raises DLRError where there is no such text, as far as can be told without reading it."""
    open_text(name)
    path = Path(name).expanduser()
    if path.suffix.lower() in FILE_TYPES:
        try:
            path.open("rb").close()
        except OSError as error:
            raise _unreadable(path, error) from error
    else:
        _datasets(name)


def _unreadable(path: Path, error: Exception) -> DLRError:
    if isinstance(error, FileNotFoundError):
        return DLRError(f"{path}: no such file")
    if isinstance(error, UnicodeDecodeError):
        return DLRError(f"{path} is not UTF-8 text: convert it, for example with iconv -t UTF-8")
    reason = getattr(error, "strerror", None) or first_line(error)
    return DLRError(f"{path} cannot be read: {reason}")


def _text_file(path: Path) -> Iterator[Iterable[str]]:
    """A .txt file is one document."""
    yield _text_file_pieces(path)


def _text_file_pieces(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _pieces(file)
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _pieces(file: TextIO) -> Iterator[str]:
    """The text in pieces, cut behind a line or in front of a space where there is one."""
    rest = ""
    while chunk := file.read(_PIECE):
        rest += chunk
        cut = rest.rfind("\n") + 1 or max(rest.rfind(" "), 0) or len(rest)
        yield rest[:cut]
        rest = rest[cut:]
    yield rest


def _jsonl_file(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path} line {number}"
                try:
                    row = json.loads(line.decode("utf-8-sig")) if line.strip() else None
                except UnicodeDecodeError as error:
                    raise DLRError(f"{where} is not UTF-8 text") from error
                except (ValueError, RecursionError) as error:
                    raise DLRError(f"{where} is not JSON: {first_line(error)}") from error
                if row is not None:
                    yield _text_of(row, where)
    except OSError as error:
        raise _unreadable(path, error) from error


def _parquet_file(path: Path) -> Iterator[str]:
    if not path.exists():
        raise DLRError(f"{path}: no such file")
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DLRError("reading .parquet needs pyarrow: pip install 'dlr-lock[data]'") from error
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            kinds = (pa.types.is_string, pa.types.is_large_string)
            strings = [field.name for field in schema if any(kind(field.type) for kind in kinds)]
            column = _text_field(strings, list(schema.names), str(path))
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _datasets(name: str) -> Any:
    """The package `datasets`, which gets what is no file."""
    try:
        import datasets
    except ImportError as error:
        raise DLRError(
            f"{name} is not a file; to look it up as a dataset, pip install 'dlr-lock[data]' "
            f"(text files end in {', '.join(FILE_TYPES)}; 'self' samples from the model)"
        ) from error
    return datasets


def _dataset(name: str) -> Iterator[str]:
    datasets = _datasets(name)
    path, *options = name.split(":")
    if len(options) > 2:
        raise DLRError(f"{name}: a dataset is written name, name:split or name:config:split")
    split = options[-1] if options else "train"
    config = options[0] if len(options) == 2 else None
    try:
        for number, row in enumerate(datasets.load_dataset(path, config, split=split, streaming=True), 1):
            yield _text_of(row, f"dataset {name}, row {number}")
    except DLRError:
        raise
    except Exception as error:  # the hub, the network, the reader: every layer has exceptions of its own
        raise DLRError(
            f"{name} is neither a file nor a dataset that can be had: {first_line(error)}"
        ) from error


def _text_of(row: Any, where: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise DLRError(f"{where} is not an object with a text field")
    strings = [key for key, value in row.items() if isinstance(value, str)]
    return row[_text_field(strings, list(row), where)]


def _text_field(strings: list[str], fields: list[str], where: str) -> str:
    """`text`, or the only string field there is."""
    if "text" in strings:
        return "text"
    if len(strings) == 1 and "text" not in fields:
        return strings[0]
    what = ", ".join(map(str, fields[:8])) or "nothing"
    raise DLRError(f"{where}: no string field 'text', and no single other string field; it has {what}")
