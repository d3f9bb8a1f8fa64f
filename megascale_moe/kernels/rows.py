"""Moving token rows by one precomputed row map (paper, section 4.1).

`RowMap` is worked out once per layer from the routing; scatter, gather and both their backwards are then a plain
row copy or a sum of rows, instead of scatter_add or a sort each. The two are each other's dual.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowMap:
    """R routed rows, grouped by expert, within an expert in the order of their tokens.

    Attributes:
        source: token of each routed row, int64 [R].
        slot: index of each routed row's assignment in the flattened [T, k] routing, int64 [R].
        counts: rows per expert; offsets their running sum, int32 [experts].
        by_token: routed rows sorted by token, int64 [R]; token_start the first of each token's, int64 [T].
    """

    source: Tensor
    slot: Tensor
    counts: list[int]
    offsets: Tensor
    by_token: Tensor
    token_start: Tensor


def row_map(choice: Tensor, first: int, count: int, kept: Tensor | None = None) -> RowMap:
    """Rows for the experts `first` .. `first + count - 1`.

    Args:
        choice: int64 [T, k], the experts of each token.
        kept: bool [T, k], assignments that were not dropped; None: all.
    """
    T, k = choice.shape
    expert = (choice - first).flatten()
    mine = (expert >= 0) & (expert < count)
    if kept is not None:
        mine &= kept.flatten()
    slots = mine.nonzero().squeeze(1)
    expert = expert[slots]
    order = expert.argsort(stable=True)
    slot = slots[order]
    source = slot // k
    counts = torch.bincount(expert, minlength=count)
    per_token = torch.bincount(source, minlength=T)
    return RowMap(
        source=source,
        slot=slot,
        counts=counts.tolist(),
        offsets=counts.cumsum(0).int(),
        by_token=source.argsort(stable=True),
        token_start=per_token.cumsum(0) - per_token,
    )


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Row copy: x [T, D], index int64 [R] -> [R, D]."""
    return x.index_select(0, index)


def sum_rows(rows: Tensor, by_token: Tensor, token_start: Tensor) -> Tensor:
    """Sum of each token's routed rows: rows [R, D] -> [T, D]; tokens without a row get zero.

    The dual of `take_rows(x, source)`. An embedding bag is exactly this sum, fused, in a fixed order.
    """
    if not len(by_token):
        return rows.new_zeros(len(token_start), rows.shape[1])
    return F.embedding_bag(by_token, rows, token_start, mode="sum")
