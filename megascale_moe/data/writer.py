"""Writes the files of a prepared corpus (`corpus.py` says which), one document after the other, in bounded memory."""

import os
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megascale_moe.data.corpus import INDEX, MANIFEST, TOKENIZER, CorpusManifest, TokenShard
from megascale_moe.data.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 28
"""A shard is closed by the document that fills it: files of half a gigabyte (uint16), easy to copy and check."""


class Writer:
    """Collects documents into shards; `close` writes the index, the tokenizer and, last, the manifest."""

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
        (self._folder / MANIFEST).write_text(self._manifest(path, source).to_json())
        for file in self._folder.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())

    def _manifest(self, path: str, source: str) -> CorpusManifest:
        return CorpusManifest(
            path=path,
            source=source,
            text=self._text.hexdigest(),
            tokenizer=self._tokenizer.digest,
            vocab=self._tokenizer.vocab,
            eos=self._tokenizer.eos,
            dtype=self._dtype,
            documents=len(self._ends) - 1,
            shards=tuple(self._shards),
        )

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
