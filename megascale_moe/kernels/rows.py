"""Moving token rows by one precomputed row map (paper, section 4.1).

`RowMap` is worked out once per layer from the routing; scatter, gather and both their backwards are then a plain
row copy or a sum of rows, instead of scatter_add or a sort each. The two are each other's dual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from megascale_moe.kernels.grouped import Groups


@dataclass(frozen=True)
class RowMap(Groups):
    """R routed rows, grouped by expert, within an expert in the order of their tokens.

    Attributes:
        source: token of each routed row, int64 [R].
        slot: index of each routed row's assignment in the flattened [T, k] routing, int64 [R].
        by_token: routed rows sorted by token, int64 [R]; token_start the first of each token's, int64 [T].
        per_token: rows of every token, where all have equally many; else 0.
        table: rows by sender and expert, one tuple per sender, of a routing without storage: how many rows there are is
            known, which ones is not.
    """

    source: Tensor
    slot: Tensor
    by_token: Tensor
    token_start: Tensor
    per_token: int = 0
    table: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def counts(self) -> list[int]:
        """Return the rows of each expert, for which the host waits for a GPU."""
        return [sum(rows) for rows in zip(*self.table, strict=True)] if self.table else super().counts

    def rows_from(self, sender: Tensor, senders: int) -> list[int]:
        """Return how many rows each sender has, `sender` naming that of every row, int64 [R] of 0 .. senders - 1."""
        return [sum(rows) for rows in self.table] if self.table else count(sender, senders).tolist()


def count(values: Tensor, kinds: int) -> Tensor:
    """Count how often each of 0 .. kinds - 1 occurs in int64 `values`: int64 [kinds].

    Not bincount: on a GPU that waits for the device to learn the size it was told, and it has no form without storage.
    """
    zeros = torch.zeros(kinds, dtype=torch.int64, device=values.device)
    return zeros.scatter_add_(0, values, torch.ones_like(values))


def row_map(
    choice: Tensor, first: int, experts: int, kept: Tensor | None = None, of: int = 0, senders: Sequence[int] = (0,)
) -> RowMap:
    """Return the rows for the experts `first` .. `first + experts - 1`.

    Args:
        choice: int64 [T, k], the experts of each token. Without storage (a dry run): routing counts as balanced.
        kept: bool [T, k], assignments that were not dropped; None: all.
        of: experts of the model, where routing counts as balanced; 0: `experts`.
        senders: the ranks whose tokens these are, equally many of each, one behind the other.
    """
    if choice.is_meta:
        return _balanced_row_map(choice, range(first, first + experts), of or experts, senders)
    T, k = choice.shape
    if kept is None and first == 0 and experts == of:
        return _whole_row_map(choice, experts)
    expert = (choice - first).flatten()
    mine = (expert >= 0) & (expert < experts)
    if kept is not None:
        mine &= kept.flatten()
    slots = mine.nonzero().squeeze(1)
    expert = expert[slots]
    order = expert.argsort(stable=True)
    slot = slots[order]
    source = slot // k
    counts = count(expert, experts)
    per_token = count(source, T)
    return RowMap(
        offsets=counts.cumsum(0).int(),
        source=source,
        slot=slot,
        by_token=source.argsort(stable=True),
        token_start=per_token.cumsum(0) - per_token,
    )


def _whole_row_map(choice: Tensor, experts: int) -> RowMap:
    """Return the rows for all experts: one per assignment, so that the host need not wait to learn how many."""
    T, k = choice.shape
    expert = choice.flatten()
    slot = expert.short().argsort(stable=True)  # a GPU sorts by bits: 35 us for 82 with all 64 of them
    each = torch.arange(T * k, device=choice.device)
    row_of_slot = torch.empty_like(slot).scatter_(0, slot, each)
    return RowMap(
        offsets=count(expert, experts).cumsum(0).int(),
        source=slot // k,
        slot=slot,
        by_token=row_of_slot.view(T, k).sort(dim=1).values.flatten(),
        token_start=each[::k].clone() if k else each,
        per_token=k,
    )


def _balanced_row_map(choice: Tensor, experts: range, of: int, senders: Sequence[int]) -> RowMap:
    """Return the rows for some experts if assignment i of the group's tokens goes to expert i modulo `of`.

    That is a routing that could be: the k experts of a token differ, and whoever counts rows of it, by expert, sender
    or receiver, on whichever rank, finds numbers that fit each other. Indices have no storage.
    """
    T, k = choice.shape
    each = T // len(senders) * k
    table = tuple(
        tuple(len(range(start + (expert - start) % of, start + each, of)) for expert in experts)
        for start in (sender * each for sender in senders)
    )
    index = choice.new_empty(sum(map(sum, table)))
    offsets = choice.new_empty(len(experts), dtype=torch.int32)
    slot, by_token = torch.empty_like(index), torch.empty_like(index)
    return RowMap(offsets, index, slot, by_token, choice.new_empty(T), table=table)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Copy rows: x [T, D], index int64 [R] -> [R, D]."""
    return x.index_select(0, index)


def sum_rows(rows: Tensor, of: RowMap) -> Tensor:
    """Return the sum of each token's routed rows: rows [R, D] -> [T, D]; tokens without a row get zero.

    The dual of `take_rows(x, source)`. An embedding bag is exactly this sum, fused, in a fixed order. On a GPU it is
    slow (0.25 ms for 67 MB on an H100): if all tokens have equally many rows, these are put side by side there.
    """
    by_token, token_start = of.by_token, of.token_start
    if of.per_token and rows.device.type == "cuda":
        return take_rows(rows, by_token).view(-1, of.per_token, rows.shape[1]).sum(1)
    if not len(by_token):
        return rows.new_zeros(len(token_start), rows.shape[1])
    return F.embedding_bag(by_token, rows, token_start, mode="sum")
