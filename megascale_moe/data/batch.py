"""What a training step eats: rows of tokens with their targets and the places where documents start.

A row is numpy, as cut from the stream; a batch is torch, the rows of one micro-batch. Segments (documents, or the parts
of them in a row) are given as cumulative offsets, the form that variable-length attention kernels take as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megascale_moe.config import ConfigError

IGNORE = -100
"""The target of a position that has none; what `torch.nn.functional.cross_entropy` ignores by default."""


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One sequence."""

    tokens: NDArray[np.int64]
    """int64 [s]"""
    targets: NDArray[np.int64]
    """int64 [s], `IGNORE` where the next token is not of the same document."""
    starts: NDArray[np.int64]
    """int64 [segments], where segments start in the row; the first is 0."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of one micro-batch."""

    tokens: Tensor
    """int64 [b, s]"""
    targets: Tensor
    """int64 [b, s], `IGNORE` where there is none."""
    boundaries: tuple[int, ...]
    """Cumulative offsets of the segments in the flattened b*s order: 0, ..., b*s. Every row starts one."""

    @cached_property
    def positions(self) -> Tensor:
        """The position of each token in its segment; int64 [b, s], 0 at every boundary."""
        offsets = torch.tensor(self.boundaries, device=self.tokens.device)
        starts = offsets[:-1].repeat_interleave(offsets.diff(), output_size=self.tokens.numel())
        return (torch.arange(self.tokens.numel(), device=self.tokens.device) - starts).view(self.tokens.shape)

    @cached_property
    def target_count(self) -> int:
        """How many positions have a target."""
        return int((self.targets != IGNORE).sum())

    @cached_property
    def longest_segment(self) -> int:
        """Tokens of the longest segment."""
        return max(end - start for start, end in pairwise(self.boundaries))

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on another device."""
        return Batch(self.tokens.to(device), self.targets.to(device), self.boundaries)


def micro_batches(rows: Sequence[TokenRow], micro_batch: int) -> list[Batch]:
    """Cut rows into batches of `micro_batch` rows, in order.

    Raises:
        ConfigError: the number of rows is not a multiple.
    """
    if micro_batch < 1 or len(rows) % micro_batch:
        raise ConfigError(
            f"train.micro_batch = {micro_batch}: the {len(rows)} rows of a data-parallel rank (train.global_batch / "
            f"parallel.dp) must be a multiple of it"
        )
    return [_stack(rows[start : start + micro_batch]) for start in range(0, len(rows), micro_batch)]


def _stack(rows: Sequence[TokenRow]) -> Batch:
    tokens = np.stack([row.tokens for row in rows])
    targets = np.stack([row.targets for row in rows])
    length = tokens.shape[1]
    starts = [index * length + row.starts for index, row in enumerate(rows)]
    boundaries = (*np.concatenate(starts).tolist(), tokens.size)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), boundaries)
