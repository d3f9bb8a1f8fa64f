"""A prepared corpus on disk, opened: token shards mapped into memory, and an index of where documents start.

    manifest.json     what this is: sizes, digests, where it came from (written last; its presence means complete)
    tokenizer.json    the tokenizer the ids belong to
    documents.npy     int64 [documents + 1], where each document starts in the stream of all tokens, and its end
    tokens-00000.bin  uint16 or uint32 (little-endian), documents one after the other, each with its EOS token

A shard ends with a document, so any part of a document is one slice of one mapping. All ranks of a node share the
pages. Nothing is unpickled: a corpus from elsewhere cannot execute code.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megascale_moe.config import ConfigError
from megascale_moe.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
"""Version of the files; part of the key in the cache, so that another release prepares its own."""

MANIFEST = "manifest.json"
INDEX = "documents.npy"
TOKENIZER = "tokenizer.json"

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

    def to_json(self) -> str:
        """Write as JSON; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> "CorpusManifest":
        """Read what `to_json` wrote.

        Raises:
            ValueError, TypeError, KeyError: the text is something else.
        """
        fields: dict[str, Any] = json.loads(text)
        shards = tuple(TokenShard(**shard) for shard in fields.pop("shards"))
        return CorpusManifest(**fields, shards=shards)


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
        if self.manifest.vocab > vocab:
            raise ConfigError(vocabulary_message(self.manifest.path, self.manifest.vocab, vocab))
        for shard, tokens in zip(self.manifest.shards, self.shards, strict=True):
            _verify_shard(self.folder / shard.file, shard, tokens, vocab)

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
    manifest = _read_manifest(folder)
    shards = tuple(_map_shard(folder / shard.file, shard, manifest.dtype) for shard in manifest.shards)
    corpus = Corpus(folder, manifest, _map_index(folder / INDEX, manifest), shards)
    if vocab is not None:
        corpus.verify(vocab)
    return corpus


def vocabulary_message(where: str, tokenizer_vocab: int, model_vocab: int) -> str:
    """Say that the model's embedding has too few rows for the tokenizer."""
    return (
        f"{where}: the tokenizer has {tokenizer_vocab} token ids, the model only {model_vocab}; "
        f"set model.vocab to at least {tokenizer_vocab} or choose another data.tokenizer"
    )


def _read_manifest(folder: Path) -> CorpusManifest:
    path = folder / MANIFEST
    try:
        manifest = CorpusManifest.from_json(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{folder}: not a prepared corpus (it has no {MANIFEST})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(_damage(path, f"not a manifest: {error!r}")) from error
    if manifest.format != FORMAT:
        raise ConfigError(_damage(path, f"format {manifest.format}, this release reads {FORMAT}"))
    return manifest


def _map_shard(path: Path, shard: TokenShard, dtype: str) -> NDArray[Any]:
    expected = shard.tokens * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.is_file() else 0
    if found != expected:
        raise ConfigError(_damage(path, f"{found} bytes where {expected} were written"))
    # Plain arrays over the mapping: slicing the memmap class itself costs several microseconds a time.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _map_index(path: Path, manifest: CorpusManifest) -> NDArray[np.int64]:
    try:
        index = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(_damage(path, str(error))) from error
    if index.shape != (manifest.documents + 1,) or index.dtype != np.int64 or index[-1] != manifest.tokens:
        raise ConfigError(_damage(path, f"not the index of {manifest.documents} documents"))
    return index


def _verify_shard(path: Path, shard: TokenShard, tokens: NDArray[Any], vocab: int) -> None:
    hasher = blake2b(digest_size=16)
    for start, chunk in _chunks(tokens):
        if int(chunk.max()) >= vocab:
            offset = int(np.argmax(chunk >= vocab))
            message = (
                f"token id {chunk[offset]} at offset {start + offset} (in tokens) is outside the vocabulary of {vocab}"
            )
            raise ConfigError(_damage(path, message))
        hasher.update(chunk.tobytes())
    if hasher.hexdigest() != shard.digest:
        raise ConfigError(_damage(path, "its bytes are not those that were written"))


def _chunks(tokens: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    for start in range(0, len(tokens), _CHUNK):
        yield start, tokens[start : start + _CHUNK]


def _damage(path: Path, message: str) -> str:
    return f"{path}: {message}; delete {path.parent} to have it prepared again"
