"""Which rows each rank trains on at each step, and the small state that brings the order back exactly.

Samples are numbered through all epochs: sample g is row g % rows of epoch g // rows. A step takes the next
`global_batch` of them, and data-parallel ranks take contiguous shares. So the order knows nothing of ranks or
micro-batches, a step may lie across two epochs, and the whole state is the number of samples consumed, on however many
ranks it is read back.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from megascale_moe.config import require
from megascale_moe.data.batch import Batch, TokenRow, micro_batches
from megascale_moe.data.packing import Packing
from megascale_moe.data.split import Split

_MUST_MATCH = {
    "text": "the text of data.path",
    "tokenizer": "data.tokenizer",
    "seed": "train.seed",
    "documents": "data.validation_fraction",
    "sequence_length": "model.sequence_length",
}
"""The entries of the state that fix the order, the likelier cause of a difference first, and what a user calls them."""


@dataclass(frozen=True, eq=False)
class LoaderStep:
    """One training step as one data-parallel rank sees it."""

    rows: tuple[TokenRow, ...]
    """The rows of this rank; `micro_batches` cuts them into batches."""
    target_count: int
    """Target tokens of the whole step, of all ranks: what the sum of losses is divided by."""


class Loader:
    """Hands out the rows of this data-parallel rank, step after step, without end."""

    def __init__(
        self,
        split: Split,
        *,
        global_batch: int,
        sequence_length: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 0,
    ) -> None:
        """Place the rows of the first epoch.

        Raises:
            ConfigError: `global_batch` is no multiple of `dp_size`, or the documents do not fill a row.
        """
        require(
            global_batch > 0 and global_batch % dp_size == 0,
            f"train.global_batch = {global_batch}: must be a positive multiple of the {dp_size} data-parallel ranks",
        )
        require(
            split.tokens >= sequence_length,
            f"data.path = {split.corpus.manifest.path!r}: {split.tokens} {split.name} tokens do not fill one row of "
            f"model.sequence_length = {sequence_length}; add text or shorten the rows",
        )
        self.samples = 0
        """Rows that all ranks together have consumed."""
        self._split, self._sequence_length, self._seed = split, sequence_length, seed
        self._global_batch, self._dp_rank, self._share = global_batch, dp_rank, global_batch // dp_size
        # Two, for the step that ends one epoch and begins the next.
        self._packing = lru_cache(maxsize=2)(partial(Packing, split, sequence_length, seed))
        self.rows_per_epoch = self._packing(0).rows

    @property
    def epoch(self) -> int:
        """The epoch of the next row, counted from 0."""
        return self.samples // self.rows_per_epoch

    def next_step(self) -> LoaderStep:
        """Return the next step's rows of this rank, and the step's number of targets on all ranks."""
        begin = self.samples
        self.samples += self._global_batch
        mine = begin + self._dp_rank * self._share
        size = self.rows_per_epoch
        rows = [self._packing(sample // size).row(sample % size) for sample in range(mine, mine + self._share)]
        targets = 0
        for epoch in range(begin // size, (self.samples - 1) // size + 1):
            samples = np.arange(max(begin, epoch * size), min(self.samples, (epoch + 1) * size))
            targets += int(self._packing(epoch).target_counts(samples % size).sum())
        return LoaderStep(tuple(rows), targets)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on from here; plain JSON, the same on all ranks."""
        manifest = self._split.corpus.manifest
        return {
            "samples": self.samples, "epoch": self.epoch, "text": manifest.text, "tokenizer": manifest.tokenizer,
            "documents": self._split.fingerprint, "seed": self._seed, "sequence_length": self._sequence_length,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken, also with another number of ranks, global batch or micro-batch.

        Raises:
            ConfigError: the state is of another corpus, tokenizer, split, seed or sequence length.
        """
        own = self.state_dict()
        for key, name in _MUST_MATCH.items():
            then, now = state.get(key), own[key]
            require(
                then == now,
                f"cannot resume: {name} is not what the checkpoint was trained with "
                f"(then {then}, now {now}); restore it, or start a new run",
            )
        self.samples = state["samples"]


class HeldOutRows:
    """The same held-out rows at every evaluation, shared out to the data-parallel ranks.

    Every rank gets the same number of batches, as collectives need; blank rows without targets fill them up. The scored
    rows, and so the loss (its sum over all ranks by `target_count`), are the same for every layout.
    """

    def __init__(
        self,
        split: Split,
        *,
        rows: int,
        sequence_length: int,
        micro_batch: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 0,
    ) -> None:
        """Choose the rows: `rows` of them, or all if there are fewer.

        Raises:
            ConfigError: no documents are held out.
        """
        require(
            len(split.documents) > 0,
            "data.validation_fraction = 0: there is nothing to evaluate on; set it, or train.eval_every = 0",
        )
        self._packing = Packing(split, sequence_length, seed, epoch=0)
        self._micro_batch = micro_batch
        self.rows = min(rows, self._packing.rows)
        self.target_count = int(self._packing.target_counts(np.arange(self.rows)).sum())
        """Target tokens of all rows on all ranks."""
        self.batches_per_rank = -(-self.rows // (dp_size * micro_batch))
        share = self.batches_per_rank * micro_batch
        self._mine = range(dp_rank * share, (dp_rank + 1) * share)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of this rank."""
        for start in range(self._mine.start, self._mine.stop, self._micro_batch):
            indices = range(start, start + self._micro_batch)
            rows = [self._packing.row(index) if index < self.rows else self._packing.blank() for index in indices]
            yield from micro_batches(rows, self._micro_batch)
