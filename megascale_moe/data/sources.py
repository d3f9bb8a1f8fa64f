"""From `data.path` to documents: which files are meant, in which order, and how to tell that they have changed.

A `Source` is a list of parts (files, or one dataset). Nothing is read to find it: a fingerprint of names, sizes and
times decides whether the prepared tokens in the cache are still those of the files.
"""

import glob
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from megascale_moe.config import ConfigError
from megascale_moe.data.hashing import digest, permutation
from megascale_moe.data.hub import DATASET_FILES, open_dataset
from megascale_moe.data.readers import PIECE_BYTES, READERS, Document, Reader, read_source_code, read_text

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_DATASET_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class SourcePart:
    """One file or dataset of a source: its size in bytes, a stamp that changes when it does, and how to read it."""

    size: int
    stamp: str
    read: Callable[[], Iterator[Document]]


@dataclass(frozen=True)
class Source:
    """The documents that `data.path` means, in a fixed order."""

    path: str
    parts: tuple[SourcePart, ...]

    @cached_property
    def size(self) -> int:
        """Bytes of all parts: the total that the sizes of the documents add up to, about."""
        return sum(part.size for part in self.parts)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the names, sizes and times of all parts."""
        return digest(*(part.stamp for part in self.parts))

    def documents(self) -> Iterator[Document]:
        """Yield every document, part after part."""
        for part in self.parts:
            yield from part.read()

    def sample(self, limit: int) -> Iterator[str]:
        """Yield texts of about `limit` characters, from all parts in proportion: what the tokenizer is trained on.

        The front of the corpus alone would be one file, or one letter of the alphabet. Large parts give a share each;
        of many small ones a shuffled few are taken whole.
        """
        left = limit
        for index in permutation(len(self.parts), "tokenizer sample"):
            part = self.parts[index]
            share = min(left, max(limit * part.size // max(self.size, 1), PIECE_BYTES))
            for text in _head(part, share):
                left -= len(text)
                yield text
            if left <= 0:
                return


def find_source(path: str, text_field: str = "text") -> Source:
    """Find what `path` names: "stdlib", a file, a folder, a glob, or a dataset ("hf:NAME", "NAME", "NAME:CONFIG").

    A folder is searched for the suffixes of `READERS`, and opened as a dataset if it was saved as one.

    Raises:
        ConfigError: there is no such file, folder or dataset, or nothing in it can be read.
    """
    if path == "stdlib":
        return _from_files(path, _stdlib_files(), text_field, read_source_code)
    if path.startswith("hf:"):
        return _from_dataset(path, path.removeprefix("hf:"), text_field)
    place = Path(path).expanduser()
    if place.is_file():
        return _from_files(path, [place], text_field)
    if place.is_dir():
        return _from_folder(path, place, text_field)
    if any(sign in path for sign in "*?["):
        found = sorted(Path(name) for name in glob.glob(str(place), recursive=True))
        return _from_files(path, [file for file in found if file.is_file()], text_field)
    if _may_be_dataset(path, place):
        return _from_dataset(path, path, text_field)
    raise ConfigError(f"data.path = {path!r}: no such file or folder (seen from {Path.cwd()})")


def _may_be_dataset(path: str, place: Path) -> bool:
    """Tell a dataset's name from a mistyped path, since asking the Hub without a network takes half a minute."""
    in_a_folder_here = "/" in path and place.parent.is_dir()
    return bool(_DATASET_NAME.fullmatch(path)) and place.suffix not in READERS and not in_a_folder_here


def _from_folder(path: str, folder: Path, text_field: str) -> Source:
    if any((folder / name).exists() for name in DATASET_FILES):
        return _from_dataset(path, str(folder), text_field)
    files = sorted(file for file in folder.rglob("*") if file.suffix in READERS and file.is_file())
    if not files:
        raise ConfigError(f"data.path = {path!r}: the folder holds no file with a suffix of {', '.join(READERS)}")
    return _from_files(path, files, text_field)


def _from_files(path: str, files: list[Path], text_field: str, reader: Reader | None = None) -> Source:
    if not files:
        raise ConfigError(f"data.path = {path!r}: matches no file (seen from {Path.cwd()})")
    return Source(path, tuple(_file_part(file.resolve(), text_field, reader) for file in files))


def _file_part(file: Path, text_field: str, reader: Reader | None) -> SourcePart:
    facts = file.stat()
    read = reader or READERS.get(file.suffix, read_text)
    stamp = f"{file}|{facts.st_size}|{facts.st_mtime_ns}|{read.__name__}|{text_field}"
    return SourcePart(facts.st_size, stamp, partial(read, file, text_field))


def _from_dataset(path: str, name: str, text_field: str) -> Source:
    dataset = open_dataset(path, name, text_field)
    return Source(path, (SourcePart(dataset.size, dataset.stamp, dataset.documents),))


def _stdlib_files() -> list[Path]:
    """List the Python sources of the running interpreter's library; a corpus that every machine has."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = set(subfolders) - _SKIPPED  # in place: os.walk then does not enter installed packages
        files += (Path(folder, name) for name in names if name.endswith(".py"))
    return sorted(files)


def _head(part: SourcePart, characters: int) -> Iterator[str]:
    for document in part.read():
        yield document.text[:characters]
        characters -= len(document.text)
        if characters <= 0:
            return
