"""The order of samples knows nothing of ranks, micro-batches or interruptions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale_moe.config import ConfigError
from megascale_moe.data import (
    IGNORE,
    Corpus,
    HeldOutRows,
    Loader,
    Packing,
    Split,
    micro_batches,
    open_corpus,
    prepare,
    split_corpus,
)

LENGTH = 32
BATCH = 12


def make_corpus(folder: Path, documents: int = 60, vocab: int = 300, word: str = "word") -> Corpus:
    folder.mkdir(exist_ok=True)
    records = (
        {"text": " ".join(f"{word}{index * number}" for number in range(index % 17 + 1))} for index in range(documents)
    )
    (folder / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return open_corpus(prepare(str(folder / "corpus.jsonl"), vocab=vocab, cache=str(folder)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def training(corpus: Corpus) -> Split:
    return split_corpus(corpus, 0.1)[0]


@pytest.fixture(scope="module")
def validation(corpus: Corpus) -> Split:
    return split_corpus(corpus, 0.1)[1]


def loaders(split: Split, dp_size: int, **options: Any) -> list[Loader]:
    settings = {"global_batch": BATCH, "sequence_length": LENGTH} | options
    return [Loader(split, dp_rank=rank, dp_size=dp_size, **settings) for rank in range(dp_size)]


def global_step(ranks: list[Loader], micro_batch: int = 1) -> list[list[int]]:
    """The rows of all ranks, one after the other, by way of their micro-batches."""
    batches = [batch for loader in ranks for batch in micro_batches(loader.next_step().rows, micro_batch)]
    return torch.cat([batch.tokens for batch in batches]).tolist()


def steps(ranks: list[Loader], count: int, micro_batch: int = 1) -> list[list[list[int]]]:
    return [global_step(ranks, micro_batch) for _ in range(count)]


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(2, 1), (2, 3), (3, 2), (4, 3), (12, 1)])
def test_rows_do_not_depend_on_ranks_and_micro_batches(dp_size: int, micro_batch: int, training: Split) -> None:
    assert steps(loaders(training, dp_size), 12, micro_batch) == steps(loaders(training, 1), 12)


@pytest.mark.parametrize("dp_size", [1, 3])
def test_every_rank_knows_the_targets_of_all(dp_size: int, training: Split) -> None:
    ranks = loaders(training, dp_size)
    for _ in range(12):  # more than an epoch
        parts = [loader.next_step() for loader in ranks]
        found = sum(int((row.targets != IGNORE).sum()) for part in parts for row in part.rows)
        assert {part.target_count for part in parts} == {found}


def test_samples_run_through_the_epochs_without_a_gap(training: Split) -> None:
    (loader,) = loaders(training, 1)
    rows = loader.rows_per_epoch
    assert rows % BATCH  # so that a step lies across two epochs
    expected = [
        Packing(training, LENGTH, 0, epoch).row(index).tokens.tolist() for epoch in range(3) for index in range(rows)
    ]
    count = 2 * rows // BATCH + 1
    assert [row for step in steps([loader], count) for row in step] == expected[: count * BATCH]
    assert loader.samples == count * BATCH
    assert loader.epoch == 2


def test_a_step_may_be_longer_than_an_epoch(training: Split) -> None:
    (small,) = loaders(training, 1)
    rows = small.rows_per_epoch
    (large,) = loaders(training, 1, global_batch=3 * rows)
    step = large.next_step()
    assert len(step.rows) == 3 * rows
    assert step.target_count == 3 * (training.tokens - len(training.documents))


def test_seeds_give_other_orders(training: Split) -> None:
    assert steps(loaders(training, 1, seed=1), 1) != steps(loaders(training, 1), 1)


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 3), (4, 1), (1, 6)])
@pytest.mark.parametrize("stop", [0, 3, 9])
def test_resumed_at_another_size_the_rows_go_on(before: int, after: int, stop: int, training: Split) -> None:
    uninterrupted = steps(loaders(training, 1), stop + 6)
    first = loaders(training, before)
    assert steps(first, stop) == uninterrupted[:stop]
    written = json.dumps(first[0].state_dict())
    second = loaders(training, after)
    for loader in second:
        loader.load_state_dict(json.loads(written))
    assert steps(second, 6) == uninterrupted[stop:]


def test_global_batch_may_change_when_resuming(training: Split) -> None:
    (first,), (second,) = loaders(training, 1), loaders(training, 1, global_batch=4)
    steps([first], 2)
    second.load_state_dict(first.state_dict())
    assert [row for step in steps([second], 3) for row in step] == steps([first], 1)[0]


def test_state_is_the_same_on_all_ranks_and_small(training: Split) -> None:
    ranks = loaders(training, 3)
    steps(ranks, 2)
    states = [loader.state_dict() for loader in ranks]
    assert states[0] == states[1] == states[2]
    assert states[0]["samples"] == 2 * BATCH
    assert len(json.dumps(states[0])) < 400


def refusal(loader: Loader, state: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        loader.load_state_dict(state)
    assert loader.samples == 0  # nothing was taken over
    return str(caught.value)


def test_resuming_with_another_sequence_length_or_seed_is_refused(training: Split) -> None:
    state = loaders(training, 1)[0].state_dict()
    assert refusal(loaders(training, 1, sequence_length=16)[0], state) == (
        "cannot resume: model.sequence_length is not what the checkpoint was trained with (then 32, now 16); "
        "restore it, or start a new run"
    )
    assert "train.seed is not what" in refusal(loaders(training, 1, seed=7)[0], state)


def test_resuming_on_other_documents_is_refused(training: Split, corpus: Corpus) -> None:
    state = loaders(training, 1)[0].state_dict()
    other = split_corpus(corpus, 0.3)[0]
    assert "data.validation_fraction is not what" in refusal(loaders(other, 1)[0], state)


@pytest.mark.parametrize(
    ("change", "name"), [({"word": "other"}, "the text of data.path"), ({"vocab": 280}, "data.tokenizer")]
)
def test_resuming_on_another_corpus_or_tokenizer_is_refused(
    change: dict[str, Any], name: str, training: Split, tmp_path: Path
) -> None:
    other = split_corpus(make_corpus(tmp_path, **change), 0.1)[0]
    state = loaders(training, 1)[0].state_dict()
    assert refusal(loaders(other, 1)[0], state).startswith(f"cannot resume: {name} is not what")


def test_state_that_lacks_entries_is_refused(training: Split) -> None:
    (loader,) = loaders(training, 1)
    assert "the text of data.path is not what" in refusal(loader, {"samples": 3})


# --- validation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 1), (1, 4), (2, 1), (3, 2)])
@pytest.mark.parametrize("rows", [3, 1000])
def test_validation_scores_the_same_rows_in_every_layout(
    rows: int, dp_size: int, micro_batch: int, validation: Split
) -> None:
    settings = {"rows": rows, "sequence_length": LENGTH}
    alone = HeldOutRows(validation, **settings)
    expected = [batch.tokens[0].tolist() for batch in alone]
    assert alone.rows == len(expected) == min(rows, -(-validation.tokens // LENGTH))

    ranks = [
        HeldOutRows(validation, micro_batch=micro_batch, dp_rank=rank, dp_size=dp_size, **settings)
        for rank in range(dp_size)
    ]
    batches = [list(one) for one in ranks]
    assert {len(some) for some in batches} == {ranks[0].batches_per_rank}
    assert sum(int((batch.targets != IGNORE).sum()) for some in batches for batch in some) == alone.target_count
    found = torch.cat([batch.tokens for some in batches for batch in some]).tolist()
    assert found[: len(expected)] == expected
    blank = torch.cat([batch.targets for some in batches for batch in some])[len(expected) :]
    assert (blank == IGNORE).all()


def test_validation_is_the_same_every_time_and_complete(validation: Split) -> None:
    evaluation = HeldOutRows(validation, rows=1000, sequence_length=LENGTH)
    first, second = ([batch.tokens.tolist() for batch in evaluation] for _ in range(2))
    assert first == second
    assert evaluation.target_count == validation.tokens - len(validation.documents)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_global_batch_must_divide(training: Split) -> None:
    with pytest.raises(
        ConfigError, match=r"train.global_batch = 12: must be a positive multiple of the 5 data-parallel"
    ):
        loaders(training, 5)
    with pytest.raises(ConfigError, match=r"train.global_batch = 0: must be a positive multiple"):
        loaders(training, 1, global_batch=0)


def test_fewer_tokens_than_a_row(training: Split) -> None:
    with pytest.raises(
        ConfigError, match=r"corpus.jsonl': \d+ training tokens do not fill one row of model.sequence_le"
    ):
        loaders(training, 1, sequence_length=1 << 20)


def test_nothing_held_out(corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match=r"data.validation_fraction = 0: there is nothing to evaluate on"):
        HeldOutRows(split_corpus(corpus, 0)[1], rows=1, sequence_length=LENGTH)
