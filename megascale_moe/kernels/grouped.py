"""Matrix products of consecutive groups of rows with a weight per group.

On a GPU the library's kernels read the groups' sizes there. The host, which would have to wait for whatever decides
about them, runs ahead; it learns them only where a loop over the groups has to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """G consecutive groups of R rows.

    Attributes:
        offsets: running sum of their sizes, int32 [G], on the device of the rows; the last is R.
    """

    offsets: Tensor

    @classmethod
    def of(cls, counts: list[int], device: torch.device | None = None) -> Groups:
        """Make groups of known sizes."""
        return Groups(torch.tensor(counts, device=device).cumsum(0).int())

    @cached_property
    def counts(self) -> list[int]:
        """Return the rows of each group, for which the host waits for a GPU."""
        ends: list[int] = self.offsets.tolist()
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def grouped_mm(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Multiply x [R, K] with weight [G, K, N], row group g with weight g -> [R, N]."""
    if x.shape[0] and _library_takes(x, weight):
        return F.grouped_mm(x, weight, offs=groups.offsets)
    out = x.new_empty(x.shape[0], weight.shape[2])
    start = 0
    for group, count in enumerate(groups.counts):
        if count:
            torch.mm(x[start : start + count], weight[group], out=out[start : start + count])
        start += count
    return out


def grouped_outer(a: Tensor, b: Tensor, groups: Groups) -> Tensor | None:
    """Return a.T @ b of each group, [G, N, K], zero without rows; None where a loop does better.

    On a CPU the loop adds into float32 buffers, without rounding each product to BF16.
    """
    if a.device.type == "cpu" or not a.shape[0] or not _library_takes(a, b):
        return None
    return F.grouped_mm(a.t(), b, offs=groups.offsets)


def rows_of_groups(values: Tensor, groups: Groups, count: int) -> Tensor:
    """Return for each of `count` rows the values [G, N] of its group, [count, N]."""
    return values[_group_of_rows(groups, count)]


def sums_of_groups(x: Tensor, groups: Groups) -> Tensor:
    """Return the sum over the rows of each group of x [R, N], [G, N] of x's dtype, zero without rows.

    A product with zeros and ones: it sums in float32 and, unlike an addition by index on a GPU, in the same order every
    time.
    """
    numbers = torch.arange(groups.offsets.shape[0], device=groups.offsets.device)
    member: Tensor = numbers[:, None] == _group_of_rows(groups, x.shape[0])
    return member.to(x.device, x.dtype) @ x


def _group_of_rows(groups: Groups, count: int) -> Tensor:
    """Return the group of each row, int64 [count]."""
    return torch.searchsorted(groups.offsets, torch.arange(count, device=groups.offsets.device), right=True)


def _library_takes(x: Tensor, weight: Tensor) -> bool:
    """Return whether torch's grouped_mm runs: on rows that are multiples of 16 bytes, and on CUDA bfloat16."""
    aligned = all(size * x.itemsize % 16 == 0 for size in (x.shape[-1], weight.shape[-1]))
    return aligned and (x.device.type == "cpu" or x.dtype == torch.bfloat16)
