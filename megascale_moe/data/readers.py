"""Formats: each reader turns one file, or a dataset, into documents, lazily, and names the file and line it fails at.

A document carries the number of bytes of its file that it accounts for, so that progress and the tokenizer's training
sample can be measured against file sizes without knowing how many documents there are.

Packages that only some corpora need are loaded when such a corpus is read: pyarrow takes 0.3 s to import and datasets a
second, and a run on text files should not wait for either.
"""

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from megascale_moe.config import ConfigError, require
from megascale_moe.data.hashing import digest

SEPARATOR = "<|endoftext|>"
"""A line of a text file that holds only this ends a document, as in the TinyStories files."""

PIECE_BYTES = 1 << 16
"""Longer stretches of a text file are cut at the next line end. A whole corpus in one file would otherwise be a single
document: nothing to shuffle, nothing to hold out, and all of it in memory."""

DATASET_FILES = ("dataset_info.json", "dataset_dict.json")
"""Either of them marks a folder written by `save_to_disk` of the library `datasets`."""

_ROWS_PER_READ = 256  # few enough that long documents fit in memory


class Document(NamedTuple):
    """One text, and how many bytes of its file it stands for."""

    text: str
    size: int


Reader = Callable[[Path, str], Iterator[Document]]


@dataclass(frozen=True)
class SourcePart:
    """One file or dataset of a source: its size in bytes, a stamp that changes when it does, and how to read it."""

    size: int
    stamp: str
    read: Callable[[], Iterator[Document]]


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
    data = b"".join(line for _, line in _numbered_lines(path))
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
        _check_column(str(path), field, {column.name: str(column.type) for column in file.schema_arrow})
        size = path.stat().st_size // max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(batch_size=_ROWS_PER_READ, columns=[field]):
            for text in batch.column(0).to_pylist():
                yield Document(text or "", size)
    except (arrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as Parquet ({_first_line(error)})") from error


def open_dataset(path: str, text_field: str) -> SourcePart:
    """Open the train split of a dataset: "owner/name", "owner/name:config", or a folder; "hf:" may stand before it.

    Raises:
        ConfigError: the package `datasets` is missing, the dataset cannot be reached, or it has no such text column.
    """
    where = f"data.path = {path!r}"
    datasets = load_extra("datasets", f"{where}: reading a dataset")
    name, _, config = path.removeprefix("hf:").partition(":")
    folder = Path(path.removeprefix("hf:")).expanduser()
    try:
        if any((folder / file).exists() for file in DATASET_FILES):
            dataset = datasets.load_from_disk(str(folder))
            if isinstance(dataset, datasets.DatasetDict):
                dataset = dataset["train"]
        elif folder.is_dir():
            dataset = datasets.load_dataset(str(folder), split="train")
        else:
            dataset = datasets.load_dataset(name, config or None, split="train")
    # The library passes on whatever its many back ends raise: network, file system, parsers, its own errors.
    except Exception as error:
        raise ConfigError(
            f"{where}: neither a file or folder here nor a dataset that can be loaded ({_first_line(error)})"
        ) from error
    types = {name: getattr(feature, "dtype", "nested values") for name, feature in dataset.features.items()}
    _check_column(where, text_field, types)
    column = dataset.select_columns([text_field])
    size = column.data.nbytes

    def read() -> Iterator[Document]:
        for batch in column.iter(batch_size=_ROWS_PER_READ):
            for text in batch[text_field]:
                yield Document(text or "", size // max(len(column), 1))

    # What the data is cached in: the library's own files, by name, size and time.
    files = [Path(entry["filename"]) for entry in dataset.cache_files]
    facts = [f"{file}|{file.stat().st_size}|{file.stat().st_mtime_ns}" for file in files]
    return SourcePart(size, digest(path, text_field, str(dataset.num_rows), *facts), read)


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


def _check_column(where: str, field: str, types: Mapping[str, str]) -> None:
    """Refuse a table without the column, or with something else than strings in it."""
    require(field in types, f"{where}: no column {field!r}; set data.text_field to one of {sorted(types)}")
    kind = types[field]
    require(kind in ("string", "large_string"), f"{where}: column {field!r} holds {kind}; expected strings")


def load_extra(module: str, purpose: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"{purpose} needs the package {package!r}, which cannot be imported ({error}); pip install {package}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
