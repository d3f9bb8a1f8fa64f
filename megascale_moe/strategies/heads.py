"""Heads: which a rank attends with, and which of them a piece of a message concerns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megascale_moe.config import ModelConfig
from megascale_moe.strategies.layer import Piece


def heads_of_rank(rank: int, size: int, c: ModelConfig) -> tuple[range, Sequence[int]]:
    """Return the query heads and the key heads that a rank attends with.

    Where ranks outnumber key heads several ranks get the same one. Where the shares do not align with the groups of
    query heads, each query head brings its own copy.
    """
    mine = range(rank * c.heads // size, (rank + 1) * c.heads // size)
    per_key = c.heads // c.key_heads
    if len(mine) % per_key == 0 or per_key % len(mine) == 0:
        return mine, range(mine[0] // per_key, mine[-1] // per_key + 1)
    return mine, [head // per_key for head in mine]


@dataclass(frozen=True)
class Chosen:
    """Some of a layer's heads, in order.

    Attributes:
        queries, keys: their numbers; keys are those of values, too.
        alone: whether this rank holds the weights of these heads and of no others.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    alone: bool = True

    @classmethod
    def everything(cls, c: ModelConfig) -> Chosen:
        """Choose all heads."""
        return cls(tuple(range(c.heads)), tuple(range(c.key_heads)))

    @classmethod
    def of_rank(cls, rank: int, size: int, c: ModelConfig) -> Chosen:
        """Choose the heads that a rank of a tensor-parallel group holds."""
        queries, keys = heads_of_rank(rank, size, c)
        return cls(tuple(queries), tuple(keys))

    @classmethod
    def of_piece(cls, piece: Piece, c: ModelConfig) -> Chosen:
        """Choose the heads that the peers of a piece attend with, peer by peer; uncut, every head once."""
        if piece.uncut:
            return cls.everything(c)
        shares = [heads_of_rank(peer, piece.axis.size, c) for peer in piece.peers]
        queries = tuple(head for mine, _ in shares for head in mine)
        return cls(queries, tuple(head for _, keys in shares for head in keys), alone=False)


def width_of(rank: int, size: int, c: ModelConfig) -> int:
    """Return the width of a rank's queries, keys and values side by side."""
    queries, keys = heads_of_rank(rank, size, c)
    return len(queries) * c.query_dim + len(keys) * (c.query_dim + c.value_dim)


def within(piece: Piece, c: ModelConfig) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Return, for each peer of a piece, where its query heads and key heads are among those of `Chosen.of_piece`."""
    shares: list[tuple[Sequence[int], Sequence[int]]] = []
    queries = keys = 0
    for mine, theirs in (heads_of_rank(peer, piece.axis.size, c) for peer in piece.peers):
        if piece.uncut:
            shares.append((mine, theirs))
        else:
            shares.append((range(queries, queries + len(mine)), range(keys, keys + len(theirs))))
        queries, keys = queries + len(mine), keys + len(theirs)
    return shares


def spans(heads: Sequence[int], width: int, start: int = 0) -> tuple[range, ...]:
    """Return the columns of some heads of equal width, contiguous ones together; the first head begins at `start`."""
    found: list[range] = []
    for head in heads:
        first = start + head * width
        if found and found[-1].stop == first:
            found[-1] = range(found[-1].start, first + width)
        else:
            found.append(range(first, first + width))
    return tuple(found)


def select(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Return some heads of x [T, heads, w], flattened to [T, len(heads) * w]."""
    part = x[:, heads.start : heads.stop] if isinstance(heads, range) else x[:, list(heads)]
    return part.reshape(x.shape[0], -1)


def pack(*parts: Tensor) -> Tensor:
    """Return heads side by side: of q, k, v [T, queries | keys | values], of k and v alone [T, keys | values]."""
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def unpack(x: Tensor, queries: int, keys: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views q [T, queries, w], k [T, keys, w], v [T, keys, u] of packed heads; w = `width`."""
    q, rest = x.tensor_split([queries * width], dim=1)
    return q.unflatten(1, (queries, -1)), *unpack_keys(rest, keys, width)


def unpack_keys(x: Tensor, keys: int, width: int) -> tuple[Tensor, Tensor]:
    """Return views k [T, keys, w], v [T, keys, u] of packed keys and values; w = `width`."""
    k, v = x.tensor_split([keys * width], dim=1)
    return k.unflatten(1, (keys, -1)), v.unflatten(1, (keys, -1))
