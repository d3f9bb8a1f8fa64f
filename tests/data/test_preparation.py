"""Preparation: what is in the cache is complete or not there, is used again, and is checked when opened."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megascale_moe.config import ConfigError
from megascale_moe.data import Corpus, load_tokenizer, open_corpus, prepare, train_tokenizer

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(20):
        (folder / f"{index:02d}.txt").write_text(f"document {index}\n" * (index + 1))
    (folder / "blank.txt").write_text(" \n")
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def decoded(corpus: Corpus) -> list[str]:
    return [
        corpus.tokenizer.decode(corpus.read(document, 0, length).tolist())
        for document, length in enumerate(corpus.lengths.tolist())
    ]


def expected_texts(folder: Path) -> list[str]:
    texts = [file.read_text() for file in sorted(folder.iterdir())]
    return [f"{text}<|endoftext|>" for text in texts if text.strip()]


def in_child(run: Callable[[], object]) -> int | None:
    process = FORK.Process(target=run)
    process.start()
    process.join()
    return process.exitcode


def test_documents_come_back_each_with_its_end(texts: Path, cache: Path) -> None:
    corpus = open_corpus(prepare(str(texts), vocab=300, cache=str(cache)), vocab=300)
    assert decoded(corpus) == expected_texts(texts)
    assert corpus.manifest.documents == 20
    assert corpus.manifest.tokens == corpus.lengths.sum() == corpus.offsets[-1]


@pytest.mark.parametrize("shard_tokens", [1, 100])  # with 1 each document fills a shard, also the last one
def test_shards_end_with_documents(
    shard_tokens: int, texts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megascale_moe.data.corpus.SHARD_TOKENS", shard_tokens)
    corpus = open_corpus(prepare(str(texts), vocab=300, cache=str(cache)), vocab=300)
    assert len(corpus.shards) > 5
    assert all(shard[-1] == corpus.manifest.eos for shard in corpus.shards)
    assert decoded(corpus) == expected_texts(texts)


def test_result_does_not_depend_on_threads_and_batches(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = open_corpus(prepare(str(texts), vocab=300, cache=str(tmp_path / "one"), threads=1))
    monkeypatch.setattr("megascale_moe.data.preparation._BATCH_CHARACTERS", 50)
    many = open_corpus(prepare(str(texts), vocab=300, cache=str(tmp_path / "many"), threads=3))
    assert one.manifest == many.manifest


def test_large_vocabularies_are_written_wide(texts: Path, cache: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["document 0\n"] * 9, 300)
    tokenizer.backend.add_tokens([f"extra-{index}" for index in range(1 << 16)])
    tokenizer.save(tmp_path / "tokenizer.json")
    corpus = open_corpus(prepare(str(texts), vocab=1 << 17, tokenizer=str(tmp_path), cache=str(cache)), vocab=1 << 17)
    assert corpus.shards[0].dtype == np.uint32
    assert decoded(corpus) == expected_texts(texts)


def test_second_call_finds_the_first(texts: Path, cache: Path) -> None:
    calls: list[tuple[int, int]] = []
    first = prepare(str(texts), vocab=300, cache=str(cache), progress=lambda *call: calls.append(call))
    size = sum(file.stat().st_size for file in texts.iterdir())
    assert calls[-1] == (size, size)
    assert calls == sorted(calls)
    calls.clear()
    assert prepare(str(texts), vocab=300, cache=str(cache), progress=lambda *call: calls.append(call)) == first
    assert calls == []


def test_what_it_depends_on_gives_another_folder(texts: Path, cache: Path, tmp_path: Path) -> None:
    train_tokenizer(["a"], 300).save(tmp_path / "tokenizer.json")
    folders = [
        prepare(str(texts), vocab=300, cache=str(cache)),
        prepare(str(texts), vocab=301, cache=str(cache)),
        prepare(str(texts), vocab=300, tokenizer=str(tmp_path), cache=str(cache)),
    ]
    (texts / "00.txt").write_text("changed")
    folders.append(prepare(str(texts), vocab=300, cache=str(cache)))
    assert len(set(folders)) == 4


def test_identity_of_the_text_does_not_depend_on_times(texts: Path, cache: Path) -> None:
    first = open_corpus(prepare(str(texts), vocab=300, cache=str(cache))).manifest
    os.utime(texts / "00.txt", ns=(5, 5))
    second = open_corpus(prepare(str(texts), vocab=300, cache=str(cache))).manifest
    assert first.source != second.source
    assert (first.text, first.tokenizer, first.shards) == (second.text, second.tokenizer, second.shards)


def test_tokenizer_is_kept_with_its_end_token(texts: Path, cache: Path, tmp_path: Path) -> None:
    train_tokenizer(["a"], 300).save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "!"}')
    corpus = open_corpus(prepare(str(texts), vocab=300, tokenizer=str(tmp_path), cache=str(cache)))
    assert corpus.tokenizer.eos == load_tokenizer(tmp_path).eos != 0
    assert corpus.shards[0][-1] == corpus.tokenizer.eos


# --- killed, interrupted, at once -----------------------------------------------------------------------------------


def test_killed_half_way_leaves_the_old_and_the_next_cleans_up(texts: Path, cache: Path) -> None:
    old = prepare(str(texts), vocab=300, cache=str(cache))
    manifest = open_corpus(old).manifest
    (texts / "00.txt").write_text("changed")

    def killed() -> None:
        prepare(str(texts), vocab=300, cache=str(cache), progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))

    assert in_child(killed) == -signal.SIGKILL
    assert [folder for folder in cache.iterdir() if (folder / "manifest.json").exists()] == [old]
    assert len(list(cache.glob("*.partial-*"))) == 1
    assert open_corpus(old, vocab=300).manifest == manifest

    new = prepare(str(texts), vocab=300, cache=str(cache))
    assert decoded(open_corpus(new, vocab=300)) == expected_texts(texts)
    assert not list(cache.glob("*.partial-*"))


def test_interrupted_preparation_leaves_nothing(texts: Path, cache: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(texts), vocab=300, cache=str(cache), progress=interrupt)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_of_several_processes_one_prepares(texts: Path, cache: Path) -> None:
    results = FORK.Queue()

    def rank() -> None:
        calls: list[int] = []
        folder = prepare(str(texts), vocab=300, cache=str(cache), progress=lambda done, _: calls.append(done))
        results.put((str(folder), bool(calls)))

    processes = [FORK.Process(target=rank) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len({folder for folder, _ in found}) == 1
    assert sum(worked for _, worked in found) == 1


def test_rename_over_a_complete_folder_of_another_machine_is_fine(texts: Path, cache: Path) -> None:
    folder = prepare(str(texts), vocab=300, cache=str(cache))
    elsewhere = folder.rename(cache / "elsewhere")

    def other_machine_is_faster(done: int, total: int) -> None:
        if done == total and elsewhere.exists():
            elsewhere.rename(folder)

    assert prepare(str(texts), vocab=300, cache=str(cache), progress=other_machine_is_faster) == folder
    assert decoded(open_corpus(folder, vocab=300)) == expected_texts(texts)
    assert not list(cache.glob("*.partial-*"))


# --- refusals -------------------------------------------------------------------------------------------------------


def test_source_without_text(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_text("\n  \n")
    with pytest.raises(ConfigError, match=r"data.path = '.*a.txt': no text in it \(files: 1, bytes: 4\)"):
        prepare(str(tmp_path / "a.txt"), vocab=300, cache=str(cache))
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_cache_that_cannot_be_written(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data.cache = '.*file': cannot be written \(File exists\)"):
        prepare(str(texts), vocab=300, cache=str(tmp_path / "file"))


def test_tokenizer_larger_than_the_model(texts: Path, cache: Path, tmp_path: Path) -> None:
    train_tokenizer([file.read_text() for file in texts.iterdir()], 300).save(tmp_path / "tokenizer.json")
    size = load_tokenizer(tmp_path).vocab
    message = rf"the tokenizer has {size} token ids, the model only 260; set model.vocab to at least {size}"
    with pytest.raises(ConfigError, match=message):
        prepare(str(texts), vocab=260, tokenizer=str(tmp_path), cache=str(cache))
    folder = prepare(str(texts), vocab=300, tokenizer=str(tmp_path), cache=str(cache))
    with pytest.raises(ConfigError, match=message):
        open_corpus(folder, vocab=260)


def patch(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def test_id_outside_the_vocabulary_is_named_by_file_and_offset(
    texts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megascale_moe.data.corpus.SHARD_TOKENS", 100)
    monkeypatch.setattr("megascale_moe.data.corpus._CHUNK", 7)
    folder = prepare(str(texts), vocab=300, cache=str(cache))
    patch(folder / "tokens-00001.bin", 2 * 40, np.uint16(300).tobytes())
    open_corpus(folder)  # without a vocabulary nothing is read
    with pytest.raises(ConfigError) as caught:
        open_corpus(folder, vocab=300)
    assert str(caught.value) == (
        f"{folder}/tokens-00001.bin: token id 300 at offset 40 (in tokens) is outside the vocabulary of 300; "
        f"delete {folder} to have it prepared again"
    )


def test_flipped_bit_within_the_vocabulary_is_found(texts: Path, cache: Path) -> None:
    folder = prepare(str(texts), vocab=300, cache=str(cache))
    (token,) = open_corpus(folder).read(0, 0, 1)
    patch(folder / "tokens-00000.bin", 0, np.uint16(token ^ 1).tobytes())
    with pytest.raises(ConfigError, match=r"tokens-00000.bin: its bytes are not those that were written; delete"):
        open_corpus(folder, vocab=300)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 2)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("manifest.json", Path.unlink, "not a prepared corpus"),
        ("manifest.json", truncate, "not a manifest"),
        (
            "manifest.json",
            lambda file: file.write_text(file.read_text().replace('"format": 1', '"format": 0')),
            "format 0",
        ),
        ("tokens-00000.bin", truncate, "bytes where"),
        ("tokens-00000.bin", Path.unlink, "0 bytes where"),
        ("documents.npy", truncate, "documents.npy"),
        ("documents.npy", Path.unlink, "documents.npy"),
        ("documents.npy", lambda file: np.save(file, np.arange(3)), "not the index of 20 documents"),
    ],
)
def test_damaged_files_are_named(
    name: str, damage: Callable[[Path], object], message: str, texts: Path, cache: Path
) -> None:
    folder = prepare(str(texts), vocab=300, cache=str(cache))
    damage(folder / name)
    with pytest.raises(ConfigError, match=message) as caught:
        open_corpus(folder)
    assert str(folder) in str(caught.value)
