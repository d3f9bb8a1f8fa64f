"""Hugging Face `datasets` as a source: the only module that knows that library, which is an optional extra.

Always the "train" split: what is held out is chosen by document in `split.py`, the same way for every kind of source.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megascale_moe.config import ConfigError
from megascale_moe.data.extras import load_extra
from megascale_moe.data.hashing import digest
from megascale_moe.data.readers import Document

DATASET_FILES = ("dataset_info.json", "dataset_dict.json")
"""Either of them marks a folder written by `save_to_disk`."""

_ROWS_PER_READ = 256


@dataclass(frozen=True)
class HubDataset:
    """One text column of a dataset: its bytes, a stamp that changes with its files, and its rows as documents."""

    column: Any
    size: int
    stamp: str

    def documents(self) -> Iterator[Document]:
        """Yield one document per row; null counts as empty."""
        size = self.size // max(len(self.column), 1)
        for batch in self.column.iter(batch_size=_ROWS_PER_READ):
            for text in next(iter(batch.values())):
                yield Document(text or "", size)


def open_dataset(path: str, name: str, text_field: str) -> HubDataset:
    """Open the train split of the dataset `name`: "owner/name", "owner/name:config", or a folder.

    Raises:
        ConfigError: the extra is missing, the dataset cannot be reached, or it has no text column `text_field`.
    """
    dataset = _load(path, name)
    if text_field not in dataset.column_names:
        names = sorted(dataset.column_names)
        raise ConfigError(f"data.path = {path!r}: no column {text_field!r}; set data.text_field to one of {names}")
    kind = getattr(dataset.features[text_field], "dtype", "nested values")
    if kind not in ("string", "large_string"):
        raise ConfigError(f"data.path = {path!r}: column {text_field!r} holds {kind}; expected strings")
    column = dataset.select_columns([text_field])
    return HubDataset(column, column.data.nbytes, _stamp(dataset, path, text_field))


def _load(path: str, name: str) -> Any:
    datasets = load_extra("datasets", f"data.path = {path!r}: reading a dataset")
    folder = Path(name).expanduser()
    try:
        if any((folder / file).exists() for file in DATASET_FILES):
            saved = datasets.load_from_disk(str(folder))
            return saved["train"] if isinstance(saved, datasets.DatasetDict) else saved
        if folder.is_dir():
            return datasets.load_dataset(str(folder), split="train")
        name, _, config = name.partition(":")
        return datasets.load_dataset(name, config or None, split="train")
    # The library passes on whatever its many back ends raise: network, file system, parsers, its own errors.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"data.path = {path!r}: neither a file or folder here nor a dataset that can be loaded ({reason})"
        ) from error


def _stamp(dataset: Any, path: str, text_field: str) -> str:
    """Hash what the data is cached in: the library's own cache files, by name, size and time."""
    files = [Path(entry["filename"]) for entry in dataset.cache_files]
    facts = [f"{file}|{file.stat().st_size}|{file.stat().st_mtime_ns}" for file in files]
    return digest(path, text_field, str(dataset.num_rows), *facts)
