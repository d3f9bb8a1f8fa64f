"""Which tokens of every sequence a rank holds, and whole sequences out of the ranks' slices.

Between modules tokens are sharded by sequence: each rank has a slice of every row of the micro-batch. Whether a slice
is contiguous is up to the attention strategy (`AttentionStrategy.zigzag`). Under a causal mask the last of n contiguous
slices would see 2n - 1 times as many keys as the first. In zig-zag order a rank holds chunks r and 2n - 1 - r of the 2n
chunks of a row instead, and all ranks have the same work.

A row that lies on several nodes is shared out twice: over the nodes in zig-zag order, and each node's share, two chunks
one behind the other, over its ranks. Where both are in zig-zag order, so are all ranks together.

Whatever turns slices into sequences or back asks here, so that routing, balance losses, vocabulary and sampling work in
either order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megascale_moe.kernels.attention import QueryBlock
from megascale_moe.model.segments import Segments


@dataclass(frozen=True)
class Slices:
    """How a micro-batch of `rows` x `length` tokens is shared out over the `parts` ranks of each of some nodes.

    Attributes:
        zigzag: whether a rank holds an early and a late chunk of its node's share of a row, not one contiguous slice.
        nodes: that share a row.
        crossed: in which order the slices of all ranks lie: those with the same place in their nodes one behind the
            other, rather than those of a node.
    """

    rows: int
    length: int
    parts: int
    zigzag: bool = False
    nodes: int = 1
    crossed: bool = False

    @property
    def between(self) -> Slices:
        """Return how rows are divided among nodes."""
        return Slices(self.rows, self.length, self.nodes, self.nodes > 1)

    @property
    def within(self) -> Slices:
        """Return how a node's share of the rows is divided among its ranks."""
        rows = self.rows * (self.nodes if self.crossed else 1)
        return Slices(rows, self.length // self.nodes, self.parts, self.zigzag)

    @property
    def ranks(self) -> int:
        """Ranks that share a row."""
        return self.nodes * self.parts

    @property
    def tokens(self) -> int:
        """Tokens of a rank."""
        return self.rows * self.length // self.ranks

    def runs(self, part: int) -> tuple[range, ...]:
        """Return the positions that a rank holds of every row, as ranges of consecutive ones, ascending."""
        if self.nodes > 1:
            node, place = divmod(part, self.parts)
            return _runs_of(self.between.runs(node), self.within.runs(place))
        chunks = (part, 2 * self.parts - 1 - part) if self.zigzag else (part,)
        width = self.length // (self.parts * len(chunks))
        return tuple(range(chunk * width, (chunk + 1) * width) for chunk in chunks)

    def take(self, x: Tensor, part: int) -> Tensor:
        """Return the slices of one rank: x [rows * length, ...] -> [tokens, ...]."""
        whole = x.view(self.rows, self.length, *x.shape[1:])
        return torch.cat([whole[:, run.start : run.stop] for run in self.runs(part)], dim=1).flatten(0, 1)

    def by_rank(self, x: Tensor) -> Tensor:
        """Return the slices of every rank, one rank behind the other; the inverse of `sequences`.

        x [groups * rows * length, ...], of one group of ranks or of several, -> [groups * ranks * tokens, ...],
        contiguous.
        """
        if self.nodes > 1:
            return self.within.by_rank(self.between.by_rank(x))
        if self.parts == 1:
            return x.contiguous()
        if self.zigzag:
            early, late = x.view(-1, self.rows, 2, self.parts, self._chunk, *x.shape[1:]).unbind(2)
            blocks = torch.stack((early, late.flip(2)), dim=3)  # [groups, rows, parts, 2, chunk, ...]
        else:
            blocks = x.view(-1, self.rows, self.parts, self._chunk, *x.shape[1:])
        return blocks.transpose(1, 2).reshape(x.shape)

    def sequences(self, x: Tensor) -> Tensor:
        """Return whole rows out of the slices of every rank, which lie one rank behind the other.

        x [groups * ranks * tokens, ...] -> [groups * rows * length, ...], contiguous.
        """
        if self.nodes > 1:
            return self.between.sequences(self.within.sequences(x))
        if self.parts == 1:
            return x.contiguous()
        if self.zigzag:
            blocks = x.view(-1, self.parts, self.rows, 2, self._chunk, *x.shape[1:])
            early, late = blocks.transpose(1, 2).unbind(3)  # [groups, rows, parts, chunk, ...]
            return torch.stack((early, late.flip(2)), dim=2).reshape(x.shape)
        blocks = x.view(-1, self.parts, self.rows, self._chunk, *x.shape[1:])
        return blocks.transpose(1, 2).reshape(x.shape)

    def blocks(self, part: int, segments: Segments, window: int) -> list[QueryBlock]:
        """Return what the queries of a rank meet of the keys of whole rows, document by document.

        Args:
            window: a query sees at most this many tokens, itself included; 0: all of its document.
        """
        documents = [(slice(row, row + 1), first, last) for row, first, last in segments.spans]
        if segments.is_whole_rows:
            documents = [(slice(0, self.rows), 0, self.length)]
        found, before = [], 0
        for run in self.runs(part):
            for rows, first, last in documents:
                a, b = max(first, run.start), min(last, run.stop)
                if a < b:
                    key = max(first, a - window + 1) if window else first
                    queries = slice(before + a - run.start, before + b - run.start)
                    found.append(QueryBlock(rows, queries, slice(key, b)))
            before += len(run)
        return found

    def place(self, position: int) -> tuple[int, int]:
        """Return which rank holds a position of the rows, and where in its slice of a row."""
        for part in range(self.ranks):
            before = 0
            for run in self.runs(part):
                if position in run:
                    return part, before + position - run.start
                before += len(run)
        raise IndexError(f"position {position} of rows of {self.length} tokens")

    @property
    def _chunk(self) -> int:
        """Tokens that stay together."""
        return self.length // (self.parts * (2 if self.zigzag else 1))


def _runs_of(share: tuple[range, ...], runs: tuple[range, ...]) -> tuple[range, ...]:
    """Positions of some runs of a share, which is itself runs of a row one behind the other."""
    found, before = [], 0
    for whole in share:
        for run in runs:
            first, last = max(run.start - before, 0), min(run.stop - before, len(whole))
            if first < last:
                found.append(whole[first:last])
        before += len(whole)
    return tuple(found)
