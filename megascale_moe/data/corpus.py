"""A prepared corpus on disk, written and opened: token shards, mapped into memory, and where documents start.

    manifest.json     what this is: sizes, digests, where it came from (written last; its presence means complete)
    tokenizer.json    the tokenizer the ids belong to
    documents.npy     int64 [documents + 1], where each document starts in the stream of all tokens, and its end
    tokens-00000.bin  uint16 or uint32 (little-endian), documents one after the other, each with its EOS token

A shard ends with a document, so any part of a document is one slice of one mapping. All ranks of a node share the
pages. Nothing is unpickled: a corpus from elsewhere cannot execute code.
"""

import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megascale_moe.config import ConfigError, require
from megascale_moe.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
"""Version of the files; part of the key in the cache, so that another release prepares its own."""

MANIFEST = "manifest.json"
INDEX = "documents.npy"
TOKENIZER = "tokenizer.json"
SHARD_TOKENS = 1 << 28
"""A shard is closed by the document that fills it: files of half a gigabyte (uint16), easy to copy and check."""

_CHUNK = 1 << 22  # tokens verified at a time


@dataclass(frozen=True)
class TokenShard:
    """One file of tokens."""

    file: str
    tokens: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class CorpusManifest:
    """The contents of `manifest.json`."""

    format: int = FORMAT
    path: str  # data.path as it was given, for messages
    source: str  # fingerprint of the files: names, sizes, times
    text: str  # digest of the documents' text; unlike `source` the same on every machine
    tokenizer: str  # digest
    vocab: int
    eos: int
    dtype: str
    documents: int
    shards: tuple[TokenShard, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all shards, EOS tokens included."""
        return sum(shard.tokens for shard in self.shards)

    @staticmethod
    def read(path: Path) -> "CorpusManifest":
        """Read what a writer wrote.

        Raises:
            ConfigError: there is no such file, or it is something else.
        """
        try:
            fields: dict[str, Any] = json.loads(path.read_text())
            shards = tuple(TokenShard(**shard) for shard in fields.pop("shards"))
            manifest = CorpusManifest(**fields, shards=shards)
        except FileNotFoundError as error:
            raise ConfigError(f"{path.parent}: not a prepared corpus (it has no {path.name})") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _damaged(path, f"not a manifest: {error!r}") from error
        if manifest.format != FORMAT:
            raise _damaged(path, f"format {manifest.format}, this release reads {FORMAT}")
        return manifest


@dataclass(frozen=True, eq=False)
class Corpus:
    """All documents of a prepared folder, as token ids."""

    folder: Path
    manifest: CorpusManifest
    offsets: NDArray[np.int64]
    """int64 [documents + 1], mapped: where each document starts in the stream of all tokens."""
    shards: tuple[NDArray[Any], ...]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, its EOS included; int64 [documents]."""
        return np.diff(self.offsets)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the ids belong to."""
        return load_tokenizer(self.folder / TOKENIZER, self.manifest.eos)

    def read(self, document: int, begin: int, end: int) -> NDArray[Any]:
        """Return tokens `begin` to `end` of a document, uint16 or uint32 [end - begin], without copying."""
        start = int(self.offsets[document])
        shard = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        start -= int(self._shard_starts[shard])
        return self.shards[shard][start + begin : start + end]

    def verify(self, vocab: int) -> None:
        """Read all tokens: every id must be below `vocab`, and every shard what was written.

        Raises:
            ConfigError: naming the file, and the offset in tokens of the first id that is too large.
        """
        check_vocabulary(self.manifest.path, self.manifest.vocab, vocab)
        for shard, tokens in zip(self.manifest.shards, self.shards, strict=True):
            path, hasher = self.folder / shard.file, blake2b(digest_size=16)
            for start in range(0, len(tokens), _CHUNK):
                chunk = tokens[start : start + _CHUNK]
                if int(chunk.max()) >= vocab:
                    first = int(np.argmax(chunk >= vocab))
                    where = f"token id {chunk[first]} at offset {start + first} (in tokens)"
                    raise _damaged(path, f"{where} is outside the vocabulary of {vocab}")
                hasher.update(chunk.tobytes())
            if hasher.hexdigest() != shard.digest:
                raise _damaged(path, "its bytes are not those that were written")

    @cached_property
    def _shard_starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(shard.tokens for shard in self.manifest.shards[:-1])], dtype=np.int64)


def open_corpus(folder: str | Path, vocab: int | None = None) -> Corpus:
    """Open what `prepare` wrote; with `vocab`, the model's vocabulary, all token ids are checked against it.

    The check reads the whole corpus, at about 1 GB/s. On a large one it is enough that one rank of a node does it.

    Raises:
        ConfigError: the folder is no prepared corpus, a file is missing or damaged, or an id is outside `vocab`.
    """
    folder = Path(folder)
    manifest = CorpusManifest.read(folder / MANIFEST)
    shards = tuple(_map_shard(folder / shard.file, shard, manifest.dtype) for shard in manifest.shards)
    path = folder / INDEX
    try:
        index = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from error
    if index.shape != (manifest.documents + 1,) or index.dtype != np.int64 or index[-1] != manifest.tokens:
        raise _damaged(path, f"not the index of {manifest.documents} documents")
    corpus = Corpus(folder, manifest, index, shards)
    if vocab is not None:
        corpus.verify(vocab)
    return corpus


def check_vocabulary(where: str, tokenizer_vocab: int, model_vocab: int) -> None:
    """Raise ConfigError if the model's embedding has too few rows for the tokenizer."""
    require(
        tokenizer_vocab <= model_vocab,
        f"{where}: the tokenizer has {tokenizer_vocab} token ids, the model only {model_vocab}; "
        f"set model.vocab to at least {tokenizer_vocab} or choose another data.tokenizer",
    )


def _map_shard(path: Path, shard: TokenShard, dtype: str) -> NDArray[Any]:
    expected = shard.tokens * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.is_file() else 0
    if size != expected:
        raise _damaged(path, f"{size} bytes where {expected} were written")
    # Plain arrays over the mapping: slicing the memmap class itself costs several microseconds a time.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _damaged(path: Path, message: str) -> ConfigError:
    return ConfigError(f"{path}: {message}; delete {path.parent} to have it prepared again")


class Writer:
    """Collects documents into shards, in bounded memory; `close` writes the index, the tokenizer and the manifest."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.tokens = 0
        self._folder = folder
        self._tokenizer = tokenizer
        self._dtype = "<u2" if tokenizer.vocab <= 1 << 16 else "<u4"
        self._ends = array("q", [0])  # eight bytes a document, where a list of int takes forty
        self._text = blake2b(digest_size=16)
        self._shards: list[TokenShard] = []
        self._start_shard()

    def add(self, text: str, ids: Sequence[int]) -> None:
        """Append a document and its EOS token; one without tokens is left out."""
        if not ids:
            return
        data = np.array([*ids, self._tokenizer.eos], dtype=self._dtype).tobytes()
        self._file.write(data)
        self._hasher.update(data)
        self._text.update(text.encode() + b"\0")
        self.tokens += len(ids) + 1
        self._ends.append(self.tokens)
        if self.tokens - self._shard_start >= SHARD_TOKENS:
            self._end_shard()
            self._start_shard()

    def close(self, path: str, source: str) -> None:
        """Finish all files and force them to the disk, so that a rename after this publishes complete ones."""
        self._end_shard()
        np.save(self._folder / INDEX, np.frombuffer(self._ends, dtype=np.int64))
        self._tokenizer.save(self._folder / TOKENIZER)
        manifest = CorpusManifest(
            path=path, source=source, text=self._text.hexdigest(), tokenizer=self._tokenizer.digest,
            vocab=self._tokenizer.vocab, eos=self._tokenizer.eos, dtype=self._dtype, documents=len(self._ends) - 1,
            shards=tuple(self._shards),
        )  # fmt: skip
        (self._folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2))
        for file in self._folder.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())

    def _start_shard(self) -> None:
        self._shard_start = self.tokens
        self._hasher = blake2b(digest_size=16)
        self._file: BinaryIO = (self._folder / f"tokens-{len(self._shards):05d}.bin").open("wb")

    def _end_shard(self) -> None:
        self._file.close()
        name = Path(self._file.name)
        if self.tokens == self._shard_start:
            name.unlink()  # an empty file cannot be mapped
            return
        self._shards.append(TokenShard(name.name, self.tokens - self._shard_start, self._hasher.hexdigest()))
