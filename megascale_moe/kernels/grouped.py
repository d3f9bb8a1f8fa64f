"""Matrix products of consecutive groups of rows with a weight per group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(x: Tensor, weight: Tensor, counts: list[int], offsets: Tensor) -> Tensor:
    """x [R, K] times weight [G, K, N], row group g with weight g -> [R, N].

    Args:
        counts: rows of each group; they sum to R.
        offsets: their running sum, int32 [G], on x's device.
    """
    if x.shape[0] and _library_takes(x, weight):
        return F.grouped_mm(x, weight, offs=offsets)
    out = x.new_empty(x.shape[0], weight.shape[2])
    start = 0
    for group, count in enumerate(counts):
        if count:
            torch.mm(x[start : start + count], weight[group], out=out[start : start + count])
        start += count
    return out


def _library_takes(x: Tensor, weight: Tensor) -> bool:
    """torch's grouped_mm wants rows that are multiples of 16 bytes, and on CUDA bfloat16."""
    aligned = all(size * x.itemsize % 16 == 0 for size in weight.shape[1:])
    return aligned and (x.device.type == "cpu" or x.dtype == torch.bfloat16)
