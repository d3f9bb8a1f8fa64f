"""The input of a training step: rows of tokens with their targets and the places where documents start.

A row is numpy, as cut from the stream; a batch is torch, the rows of one micro-batch. Segments (documents, or the parts
of them in a row) are given as cumulative offsets, the form that variable-length attention kernels take as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megascale_moe.config import require

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


def micro_batches(rows: Sequence[TokenRow], micro_batch: int) -> list[Batch]:
    """Cut rows into batches of `micro_batch` rows, in order.

    Raises:
        ConfigError: the number of rows is not a multiple.
    """
    require(
        micro_batch > 0 and len(rows) % micro_batch == 0,
        f"train.micro_batch = {micro_batch}: the {len(rows)} rows of a data-parallel rank (train.global_batch / "
        f"parallel.dp) must be a multiple of it",
    )
    batches = []
    for start in range(0, len(rows), micro_batch):
        part = rows[start : start + micro_batch]
        tokens, targets = np.stack([row.tokens for row in part]), np.stack([row.targets for row in part])
        starts = [index * tokens.shape[1] + row.starts for index, row in enumerate(part)]
        boundaries = (*np.concatenate(starts).tolist(), tokens.size)
        batches.append(Batch(torch.from_numpy(tokens), torch.from_numpy(targets), boundaries))
    return batches
