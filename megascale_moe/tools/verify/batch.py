"""The global batch that every layout works on, and what a rank's micro-batches are of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megascale_moe.config import ModelConfig
from megascale_moe.model.segments import Segments


@dataclass(frozen=True)
class BatchRows:
    """Sequences: tokens and targets int64 [rows, length], and where documents start in each row."""

    tokens: Tensor
    targets: Tensor
    starts: tuple[tuple[int, ...], ...]

    def part(self, rows: slice) -> tuple[Tensor, Tensor, Segments]:
        """Return tokens, targets and documents of some of the rows, as those of a micro-batch."""
        length = self.tokens.shape[1]
        picked = self.starts[rows]
        bounds = [row * length + start for row, starts in enumerate(picked) for start in starts]
        return self.tokens[rows], self.targets[rows], Segments(len(picked), length, (*bounds, len(picked) * length))

    @property
    def target_count(self) -> int:
        """Targets that count."""
        return int((self.targets >= 0).sum())


def random_rows(config: ModelConfig, rows: int, seed: int = 1) -> BatchRows:
    """Return rows with random tokens, every second one packed from several documents, one target in nine missing."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, config.sequence_length)
    tokens = torch.randint(0, config.vocab, shape, generator=generator)
    targets = torch.randint(0, config.vocab, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < 1 / 9] = -100
    starts = [(0,) if row % 2 else (0, 5, config.sequence_length // 2 + 1) for row in range(rows)]
    return BatchRows(tokens, targets, tuple(starts))
