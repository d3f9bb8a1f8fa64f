"""File formats: each reader turns one file into documents, lazily, and names the file and line it fails at.

A document carries the number of bytes of its file that it accounts for, so that progress and the tokenizer's training
sample can be measured against file sizes without knowing how many documents there are.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megascale_moe.config import ConfigError
from megascale_moe.data.extras import load_extra

SEPARATOR = "<|endoftext|>"
"""A line of a text file that holds only this ends a document, as in the TinyStories files."""

PIECE_BYTES = 1 << 16
"""Longer stretches of a text file are cut at the next line end. A whole corpus in one file would otherwise be a single
document: nothing to shuffle, nothing to hold out, and all of it in memory."""

_ROWS_PER_READ = 256  # of Parquet: few enough that long documents fit in memory


class Document(NamedTuple):
    """One text, and how many bytes of its file it stands for."""

    text: str
    size: int


Reader = Callable[[Path, str], Iterator[Document]]


def read_text(path: Path, _field: str) -> Iterator[Document]:
    """Yield the documents of a plain text file, divided by `SEPARATOR` lines and into pieces of `PIECE_BYTES`."""
    lines: list[str] = []
    size = 0
    for number, line in _numbered_lines(path):
        size += len(line)
        text = _decode(line, path, number)
        separates = text.strip() == SEPARATOR
        if not separates:
            lines.append(text)
        if separates or size >= PIECE_BYTES:
            yield Document("".join(lines), size)
            lines, size = [], 0
    yield Document("".join(lines), size)


def read_source_code(path: Path, _field: str) -> Iterator[Document]:
    """Yield a whole file as one document; bytes that are not UTF-8 become replacement characters."""
    data = _read_bytes(path)
    yield Document(data.decode(errors="replace"), len(data))


def read_jsonl(path: Path, field: str) -> Iterator[Document]:
    """Yield one document per line, the string under `field`; empty lines are skipped, null counts as empty."""
    for number, line in _numbered_lines(path):
        if line.strip():
            yield Document(_json_text(line, field, path, number), len(line))


def read_parquet(path: Path, field: str) -> Iterator[Document]:
    """Yield one document per row, the string in the column `field`; null counts as empty."""
    parquet = load_extra("pyarrow.parquet", f"{path}: reading Parquet")
    arrow = load_extra("pyarrow", f"{path}: reading Parquet")
    try:
        file = parquet.ParquetFile(path)
        _check_column(file.schema_arrow, field, path, arrow)
        size = path.stat().st_size // max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(batch_size=_ROWS_PER_READ, columns=[field]):
            for text in batch.column(0).to_pylist():
                yield Document(text or "", size)
    except (arrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as Parquet ({_first_line(error)})") from error


READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".text": read_text,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_jsonl,
    ".parquet": read_parquet,
}
"""The reader for each suffix. These are what a folder is searched for; a file named outright is text otherwise."""


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            yield from enumerate(file, start=1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        known = ", ".join(READERS)
        raise ConfigError(f"{path}:{number}: not UTF-8 text; expected text, or one of {known}") from error


def _json_text(line: bytes, field: str, path: Path, number: int) -> str:
    try:
        record = json.loads(_decode(line, path, number))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{number}: not JSON ({error.msg}); expected one object on each line") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{path}:{number}: a JSON {type(record).__name__}; expected an object on each line")
    if field not in record:
        raise ConfigError(f"{path}:{number}: no field {field!r}; set data.text_field to one of {sorted(record)}")
    text = record[field]
    if not isinstance(text, str | None):
        raise ConfigError(f"{path}:{number}: field {field!r} is a {type(text).__name__}; expected a string")
    # JSON can spell half a surrogate pair, which is no text: UTF-8 cannot hold it and the tokenizer refuses it.
    return (text or "").encode(errors="replace").decode()


def _check_column(schema: Any, field: str, path: Path, arrow: Any) -> None:
    if field not in schema.names:
        raise ConfigError(f"{path}: no column {field!r}; set data.text_field to one of {sorted(schema.names)}")
    kind = schema.field(field).type
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
        raise ConfigError(f"{path}: column {field!r} holds {kind}; expected strings")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
