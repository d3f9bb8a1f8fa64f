"""Which part of which weight a rank holds, and who else holds the same.

A weight is cut by what a strategy needs (experts by index, heads and expert widths by rows or columns, layers by
pipeline stage), and whoever holds the same part sums its gradients. Both are said here, once: the flat buffers of the
optimizer, initial weights, checkpoints and the dry run all read it, so none of them knows a strategy.

A part is a list of boxes of the whole weight. Flattened row by row and put one behind the other they are the local
weight flattened row by row. Several are needed where a fused weight is cut: the rows of a rank's queries, keys and
values lie in three places of `qkv`, gate and up rows of an expert in two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, size) in each dimension."""


@dataclass(frozen=True)
class Placement:
    """A rank's part of one weight.

    Attributes:
        whole: shape of the whole weight. shape: of this rank's part.
        boxes: where the part lies in the whole.
        replicas: the two axes whose product holds copies of the part and partial sums of its gradient: ranks of one
            node first ("" if they hold different parts), then the same place in other nodes.
    """

    whole: tuple[int, ...]
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    replicas: tuple[str, str]

    def take(self, whole: Tensor) -> Tensor:
        """This part of the whole weight, as a new tensor."""
        parts = [_at(whole, box).flatten() for box in self.boxes]
        return torch.cat(parts).view(self.shape)

    @property
    def ranges(self) -> list[tuple[Box, int, int]]:
        """Each box with the range of the flattened part that it fills."""
        found, end = [], 0
        for box in self.boxes:
            start, end = end, end + math.prod(box[1])
            found.append((box, start, end))
        return found


def _at(whole: Tensor, box: Box) -> Tensor:
    return whole[tuple(slice(start, start + size) for start, size in zip(*box, strict=True))]


def everything(whole: Sequence[int], replicas: tuple[str, str]) -> Placement:
    """The whole weight on every rank of the axes."""
    shape = tuple(whole)
    return Placement(shape, shape, (((0,) * len(shape), shape),), replicas)


def rows(whole: Sequence[int], ranges: Sequence[range], replicas: tuple[str, str]) -> Placement:
    """Some ranges of a weight's first dimension, in order."""
    tail = tuple(whole[1:])
    boxes = tuple(((part.start, *(0,) * len(tail)), (len(part), *tail)) for part in ranges)
    return Placement(tuple(whole), (sum(map(len, ranges)), *tail), boxes, replicas)


def columns(whole: Sequence[int], part: range, replicas: tuple[str, str]) -> Placement:
    """A range of a weight's last dimension."""
    lead = tuple(whole[:-1])
    shape = (*lead, len(part))
    return Placement(tuple(whole), shape, (((*(0,) * len(lead), part.start), shape),), replicas)


def share(size: int, parts: int, index: int) -> range:
    """The `index`-th of `parts` equal parts of a dimension."""
    width = size // parts
    return range(index * width, (index + 1) * width)
