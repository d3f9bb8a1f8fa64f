"""Documents to token shards, once: a cache folder keeps prepared corpora under a key of all that they depend on.

Nothing half-written is ever visible: the files are written in a folder beside and that folder is renamed into place.
A process killed in between leaves only its own partial folder, which the next one on this machine removes. A lock lets
any number of processes call `prepare` at once: one works, the others wait and find the result.
"""

import fcntl
import os
import shutil
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megascale_moe.config import ConfigError, require
from megascale_moe.data.corpus import FORMAT, MANIFEST, Writer, check_vocabulary
from megascale_moe.data.hashing import digest
from megascale_moe.data.readers import Document
from megascale_moe.data.sources import Source, find_source
from megascale_moe.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

DEFAULT_CACHE = "~/.cache/megascale_moe"
SAMPLE_CHARACTERS = 20_000_000
"""Most text that a tokenizer is trained on: it takes seconds, and more text does not change the merges much."""

_BATCH_CHARACTERS = 1 << 20  # encoded at a time by a thread: long enough to hide the hand-over, short for progress

Progress = Callable[[int, int], None]
"""Called with the bytes of the source done so far, and in all."""


def prepare(
    path: str = "stdlib",
    *,
    vocab: int,
    tokenizer: str = "",
    text_field: str = "text",
    cache: str = "",
    threads: int = 2,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of the prepared corpus, for `open_corpus`; write it first unless the cache has it.

    Args:
        path: "stdlib", a file, a folder, a glob, or a dataset; see `find_source`.
        vocab: the model's vocabulary. Also what a tokenizer is trained to, if `tokenizer` is empty.
        tokenizer: path of a `tokenizer.json`, or of a folder with one.
        text_field: the field or column of JSONL, Parquet and datasets that holds the text.
        cache: folder for prepared corpora; empty for `DEFAULT_CACHE`.
        threads: how many encode at once.
        progress: told how far it is; not called on a cached corpus.

    Raises:
        ConfigError: the source or tokenizer cannot be used, there is no text in it, or the cache cannot be written.
    """
    source = find_source(path, text_field)
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    if loaded:
        check_vocabulary(f"data.tokenizer = {tokenizer!r}", loaded.vocab, vocab)
    key = digest(str(FORMAT), source.fingerprint, loaded.digest if loaded else f"train {vocab}")
    root = Path(cache or DEFAULT_CACHE).expanduser()
    folder = root / key
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel gives it back when this process ends, however it ends
            if not (folder / MANIFEST).exists():
                with _partial(folder) as partial:
                    _write(partial, source, loaded, vocab, threads, progress)
    except OSError as error:
        raise ConfigError(f"data.cache = {str(root)!r}: cannot be written ({error.strerror or error})") from error
    return folder


def _write(
    folder: Path, source: Source, loaded: Tokenizer | None, vocab: int, threads: int, progress: Progress | None
) -> None:
    tokenizer = loaded or train_tokenizer(source.sample(SAMPLE_CHARACTERS), vocab)
    writer = Writer(folder, tokenizer)
    done = 0
    for documents, ids in _encoded(source.documents(), tokenizer, threads):
        for document, document_ids in zip(documents, ids, strict=True):
            writer.add(document.text, document_ids)
            done += document.size
        if progress:
            progress(min(done, source.size), source.size)
    files, size = len(source.parts), source.size
    require(writer.tokens > 0, f"data.path = {source.path!r}: no text in it (files: {files}, bytes: {size})")
    writer.close(source.path, source.fingerprint)
    if progress:
        progress(source.size, source.size)


def _encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, threads: int
) -> Iterator[tuple[list[Document], list[list[int]]]]:
    """Yield batches of documents with their ids, in order, encoded by threads a few batches ahead of the reader."""
    waiting: deque[tuple[list[Document], Future[list[list[int]]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for batch in _batches(documents):
            waiting.append((batch, pool.submit(tokenizer.encode, [document.text for document in batch])))
            if len(waiting) > 2 * threads:
                ready, ids = waiting.popleft()
                yield ready, ids.result()
        for ready, ids in waiting:
            yield ready, ids.result()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        if not document.text.strip():
            continue
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """Give a new folder to write in; rename it to `folder` in the end, or remove it if the writing failed.

    The name holds the machine, because a lock on a network file system may not reach other machines: they prepare the
    same corpus twice then, and the second rename fails over a complete folder, which is as good.
    """
    prefix = f"{folder.name}.partial-{socket.gethostname()}-"
    for left_over in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    partial = folder.parent / f"{prefix}{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / MANIFEST).exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
