"""Where documents begin: the host-side description of packed rows.

Attention, positions and the balance loss must not look across documents. All three derive from one
sorted tuple of offsets, kept on the host because it decides how many kernels run, not what they compute.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Documents of a micro-batch of `rows` x `length` tokens.

    `boundaries` are offsets into the flattened tokens: 0, then every place where a document or a row
    starts, then rows * length.
    """

    rows: int
    length: int
    boundaries: tuple[int, ...]

    @classmethod
    def whole_rows(cls, rows: int, length: int) -> Segments:
        """Make one document of each row."""
        return cls(rows, length, tuple(range(0, rows * length + 1, length)))

    def __post_init__(self) -> None:
        starts = set(self.boundaries)
        if not all(row * self.length in starts for row in range(self.rows + 1)):
            raise ValueError(f"boundaries must contain every multiple of {self.length} up to {self.rows * self.length}")
        if any(a >= b for a, b in itertools.pairwise(self.boundaries)):
            raise ValueError("boundaries must rise strictly")

    @property
    def count(self) -> int:
        """Return the number of documents."""
        return len(self.boundaries) - 1

    @cached_property
    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """Return (row, first, last + 1) of every document, positions counted inside its row."""
        pairs = itertools.pairwise(self.boundaries)
        return tuple((a // self.length, a % self.length, a % self.length + b - a) for a, b in pairs)

    @cached_property
    def is_whole_rows(self) -> bool:
        """Return whether every row is one document, so that one batched kernel serves all."""
        return self.count == self.rows

    @cached_property
    def lengths(self) -> Tensor:
        """Return the tokens of each document, int64 [count]."""
        return torch.tensor(self.boundaries).diff()

    def documents(self) -> Tensor:
        """Return the document of each token, int64 [rows * length]."""
        return torch.repeat_interleave(torch.arange(self.count), self.lengths)

    def positions(self) -> Tensor:
        """Return the position of each token in its document, int64 [rows * length]."""
        starts = torch.repeat_interleave(torch.tensor(self.boundaries[:-1]), self.lengths)
        return torch.arange(self.rows * self.length) - starts
