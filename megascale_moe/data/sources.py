"""From `data.path` to documents: which files are meant, in which order, and how to tell that they have changed.

A `Source` is a list of parts (files, or one dataset). Nothing is read to find it: a fingerprint of names, sizes and
times decides whether the prepared tokens in the cache are still those of the files.
"""

import glob
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from megascale_moe.config import ConfigError, require
from megascale_moe.data.hashing import digest, permutation
from megascale_moe.data.readers import (
    DATASET_FILES,
    PIECE_BYTES,
    READERS,
    Document,
    Reader,
    SourcePart,
    open_dataset,
    read_source_code,
    read_text,
)

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_DATASET_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


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
            for document in part.read():
                text = document.text[:share]
                yield text
                left, share = left - len(text), share - len(document.text)
                if share <= 0:
                    break
            if left <= 0:
                return


def find_source(path: str, text_field: str = "text") -> Source:
    """Find what `path` names: "stdlib", a file, a folder, a glob, or a dataset ("hf:NAME", "NAME", "NAME:CONFIG").

    A folder is searched for the suffixes of `READERS`, and opened as a dataset if it was saved as one.

    Raises:
        ConfigError: there is no such file, folder or dataset, or nothing in it can be read.
    """
    place = Path(path).expanduser()
    if path == "stdlib":
        return _from_files(path, _stdlib_files(), text_field, read_source_code)
    if path.startswith("hf:") or any((place / name).exists() for name in DATASET_FILES):
        return Source(path, (open_dataset(path, text_field),))
    if place.is_file():
        return _from_files(path, [place], text_field)
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.suffix in READERS and file.is_file())
        require(bool(files), f"data.path = {path!r}: the folder holds no file with a suffix of {', '.join(READERS)}")
        return _from_files(path, files, text_field)
    if any(sign in path for sign in "*?["):
        files = sorted(file for file in map(Path, glob.glob(str(place), recursive=True)) if file.is_file())
        require(bool(files), f"data.path = {path!r}: matches no file (seen from {Path.cwd()})")
        return _from_files(path, files, text_field)
    # Tell a dataset's name from a mistyped path: asking the Hub without a network takes half a minute.
    in_a_folder_here = "/" in path and place.parent.is_dir()
    if _DATASET_NAME.fullmatch(path) and place.suffix not in READERS and not in_a_folder_here:
        return Source(path, (open_dataset(path, text_field),))
    raise ConfigError(f"data.path = {path!r}: no such file or folder (seen from {Path.cwd()})")


def _from_files(path: str, files: Sequence[Path], text_field: str, reader: Reader | None = None) -> Source:
    parts = []
    for file in map(Path.resolve, files):
        facts, read = file.stat(), reader or READERS.get(file.suffix, read_text)
        stamp = f"{file}|{facts.st_size}|{facts.st_mtime_ns}|{read.__name__}|{text_field}"
        parts.append(SourcePart(facts.st_size, stamp, partial(read, file, text_field)))
    return Source(path, tuple(parts))


def _stdlib_files() -> list[Path]:
    """List the Python sources of the running interpreter's library; a corpus that every machine has."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = set(subfolders) - _SKIPPED  # in place: os.walk then does not enter installed packages
        files += (Path(folder, name) for name in names if name.endswith(".py"))
    return sorted(files)
