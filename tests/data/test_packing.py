"""Packing: every token once, every target inside a document, none across documents, counted without reading.

Documents are made of unique ids, so that a token says by itself where it came from and what must follow it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from megascale_moe.config import ConfigError
from megascale_moe.data import (
    IGNORE,
    Corpus,
    Packing,
    TokenRow,
    micro_batches,
    open_corpus,
    split_corpus,
    train_tokenizer,
)
from megascale_moe.data.corpus import Writer
from megascale_moe.data.hashing import digest, permutation
from megascale_moe.data.split import Split

EOS = 0


def write_corpus(folder: Path, lengths: Sequence[int]) -> Corpus:
    """Documents of so many tokens, EOS included, with ids 1, 2, 3 ... through all of them."""
    folder.mkdir()
    tokenizer = train_tokenizer(["a"], 257)
    writer = Writer(folder, tokenizer)
    start = 1
    for length in lengths:
        writer.add("", range(start, start + length - 1))
        start += length - 1
    writer.close("made", "made")
    return open_corpus(folder)


def all_of(corpus: Corpus) -> Split:
    return Split(corpus, "training", np.arange(corpus.manifest.documents))


def last_ids(corpus: Corpus) -> set[int]:
    """The ids that the EOS follows."""
    return {
        int(corpus.read(document, length - 2, length)[0]) for document, length in enumerate(corpus.lengths.tolist())
    }


LENGTHS = {
    "shorter than a row": [2, 3, 4, 2, 5, 3, 2, 7, 2],
    "longer than a row": [30, 9, 17, 64],
    "exactly a row": [8, 8, 8],
    "two rows in one document": [16],
    "mixed": [2, 50, 3, 8, 2, 2, 2, 31, 9, 5],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_an_epoch_is_every_token_once_and_every_target(lengths: list[int], epoch: int, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", lengths)
    packing = Packing(all_of(corpus), 8, seed=3, epoch=epoch)
    rows = [packing.row(index) for index in range(packing.rows)]
    tokens = np.concatenate([row.tokens for row in rows])
    targets = np.concatenate([row.targets for row in rows])

    content = sorted(tokens[tokens != EOS].tolist())
    assert content == list(range(1, sum(lengths) - len(lengths) + 1))
    assert len(tokens) - sum(lengths) == -sum(lengths) % 8  # what fills the last row
    # Every position of a document but its last has the token after it as target.
    ends = last_ids(corpus)
    for token, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        if token == EOS:
            assert target == IGNORE
        else:
            assert target == (EOS if token in ends else token + 1)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_segments_start_where_documents_do_and_with_each_row(lengths: list[int], tmp_path: Path) -> None:
    packing = Packing(all_of(write_corpus(tmp_path / "corpus", lengths)), 8, seed=0, epoch=0)
    for index in range(packing.rows):
        row = packing.row(index)
        ends = np.flatnonzero(row.tokens[:-1] == EOS) + 1
        padding = np.flatnonzero((row.tokens[1:] == EOS) & (row.tokens[:-1] == EOS)) + 2  # one segment, so no start
        assert row.starts.tolist() == [0, *(end for end in ends.tolist() if end not in padding)]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_targets_are_counted_without_reading(lengths: list[int], tmp_path: Path) -> None:
    packing = Packing(all_of(write_corpus(tmp_path / "corpus", lengths)), 8, seed=0, epoch=0)
    counted = packing.target_counts(np.arange(packing.rows))
    assert counted.tolist() == [(packing.row(index).targets != IGNORE).sum() for index in range(packing.rows)]
    assert counted.sum() == sum(lengths) - len(lengths)


def test_rows_of_a_known_stream(tmp_path: Path) -> None:
    # One document: 1 2 3 4 5 6 E, and one E to fill the second row.
    packing = Packing(all_of(write_corpus(tmp_path / "corpus", [7])), 4, seed=0, epoch=0)
    first, second = sorted((packing.row(0), packing.row(1)), key=lambda row: int(row.tokens[0]))
    assert first.tokens.tolist() == [1, 2, 3, 4]
    assert first.targets.tolist() == [2, 3, 4, 5]
    assert first.starts.tolist() == [0]
    assert second.tokens.tolist() == [5, 6, EOS, EOS]
    assert second.targets.tolist() == [6, EOS, IGNORE, IGNORE]
    assert second.starts.tolist() == [0, 3]


def test_blank_row_has_no_targets(tmp_path: Path) -> None:
    row = Packing(all_of(write_corpus(tmp_path / "corpus", [8, 8])), 8, seed=0, epoch=0).blank()
    assert row.tokens.tolist() == [EOS] * 8
    assert row.targets.tolist() == [IGNORE] * 8
    assert row.starts.tolist() == [0]


def test_order_depends_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    split = all_of(write_corpus(tmp_path / "corpus", [5] * 40))

    def order(seed: int, epoch: int) -> list[int]:
        packing = Packing(split, 8, seed, epoch)
        return [int(token) for index in range(packing.rows) for token in packing.row(index).tokens]

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def first_tokens(packing: Packing) -> list[int]:
    return [int(packing.row(index).tokens[0]) for index in range(packing.rows)]


def test_rows_of_one_long_document_are_shuffled_anew_in_each_epoch(tmp_path: Path) -> None:
    split = all_of(write_corpus(tmp_path / "corpus", [400]))
    first, second = (first_tokens(Packing(split, 8, seed=0, epoch=epoch)) for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(1, 400, 8))


def test_permutation_is_fixed_for_ever() -> None:
    """Changing these numbers breaks the resumption of every run there is."""
    assert permutation(8, "documents", 0, 0).tolist() == [0, 1, 2, 6, 5, 4, 3, 7]
    assert sorted(permutation(1000, "x").tolist()) == list(range(1000))
    assert permutation(0, "x").tolist() == []
    # The mean of |i - p(i)| of a random permutation is (n*n - 1) / 3n; its spread here is about 8.
    assert np.abs(permutation(1000, "x") - np.arange(1000)).mean() == pytest.approx(333, abs=30)


def test_digest_tells_parts_apart() -> None:
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("a") == digest(b"a")


# --- batches --------------------------------------------------------------------------------------------------------


def row(tokens: list[int], starts: list[int]) -> TokenRow:
    targets = np.array([*tokens[1:], IGNORE])
    return TokenRow(np.array(tokens), targets, np.array(starts))


def test_batch_joins_boundaries() -> None:
    (batch,) = micro_batches([row([1, 2, 3, 4], [0, 3]), row([5, 6, 7, 8], [0]), row([9, 1, 2, 3], [0, 1, 2])], 3)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 1, 2, 3]]
    assert batch.boundaries == (0, 3, 4, 8, 9, 10, 12)
    assert batch.targets.tolist() == [[2, 3, 4, IGNORE], [6, 7, 8, IGNORE], [1, 2, 3, IGNORE]]


def test_micro_batches_keep_the_order_and_divide_the_rows() -> None:
    rows = [row([index, index], [0]) for index in range(6)]
    assert [batch.tokens[:, 0].tolist() for batch in micro_batches(rows, 2)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ConfigError, match=r"train.micro_batch = 4: the 6 rows of a data-parallel rank"):
        micro_batches(rows, 4)


# --- training and validation documents ------------------------------------------------------------------------------


def test_split_holds_out_the_share_of_tokens(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(2, 40, 500).tolist()
    training, validation = split_corpus(write_corpus(tmp_path / "corpus", lengths), 0.1, seed=1)
    assert sorted([*training.documents, *validation.documents]) == list(range(500))
    assert 0.1 <= validation.tokens / sum(lengths) < 0.1 + 40 / sum(lengths)
    assert training.tokens + validation.tokens == sum(lengths)


def test_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", [9] * 100)
    first, again, other = (split_corpus(corpus, 0.1, seed)[1] for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert set(first.documents.tolist()) != set(other.documents.tolist())


@pytest.mark.parametrize(("lengths", "fraction", "held_out"), [([9, 9], 0.01, 1), ([9, 9], 0.99, 1), ([9], 0.0, 0)])
def test_split_keeps_a_document_on_either_side(
    lengths: list[int], fraction: float, held_out: int, tmp_path: Path
) -> None:
    training, validation = split_corpus(write_corpus(tmp_path / "corpus", lengths), fraction)
    assert len(validation.documents) == held_out
    assert len(training.documents) == len(lengths) - held_out


def test_split_refusals(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", [9])
    with pytest.raises(ConfigError, match=r"data.path = 'made': a single document, none can be held out"):
        split_corpus(corpus)
    with pytest.raises(ConfigError, match=r"data.validation_fraction = 1.5: must be at least 0 and below 1"):
        split_corpus(corpus, 1.5)
