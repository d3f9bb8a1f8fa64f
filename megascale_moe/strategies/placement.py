"""Which part of which weight a rank holds, and who else holds the same.

A weight is cut by what a strategy needs (experts by index, heads and expert widths by rows or columns, layers by
pipeline stage), and whoever holds the same part sums its gradients. Both are said here, once: the flat buffers of the
optimizer, initial weights, checkpoints and the dry run all read it, so none of them knows a strategy.

A part is a list of boxes of the whole weight. Flattened row by row and put one behind the other they are the local
weight flattened row by row. Several are needed where a fused weight is cut: the rows of a rank's queries, keys and
values lie in three places of `qkv`, gate and up rows of an expert in two.

An optimizer that works on whole matrices also has to know which matrices a weight consists of, what a rank has of
each, and over which axis the rest lies: `matrices`, `matrix_parts` and `cut`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megascale_moe.model.weights import Kind, Weight

WeightRule = Callable[[Weight], "Placement"]
TENSOR = ("", "tensor_data")
"""Replicas of what each rank of a node has another part of."""

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
        matrices: heights in rows of the matrices that the last two dimensions of the whole weight stack on top of each
            other (`Weight.matrices`); empty for what is no matrix.
        cut: the axis over which each matrix is cut into equal parts of its rows or columns; "" where a rank that has a
            part of a matrix has all of it.
        kind: what the weight is; None: a matrix or a vector, as its shape says.
    """

    whole: tuple[int, ...]
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    replicas: tuple[str, str]
    matrices: tuple[int, ...] = ()
    cut: str = ""
    kind: Kind | None = None

    @property
    def decays(self) -> bool:
        """Whether weight decay acts on it."""
        return self.kind.decays if self.kind else len(self.whole) > 1

    def take(self, whole: Tensor) -> Tensor:
        """This part of the whole weight, as a new tensor."""
        parts = [at_box(whole, box).flatten() for box in self.boxes]
        return torch.cat(parts).view(self.shape)

    @property
    def ranges(self) -> list[tuple[Box, int, int]]:
        """Each box with the range of the flattened part that it fills."""
        found, end = [], 0
        for box in self.boxes:
            start, end = end, end + math.prod(box[1])
            found.append((box, start, end))
        return found

    @property
    def matrix_parts(self) -> list[MatrixPart]:
        """Return the parts of matrices that this rank holds, in the order of its flattened elements."""
        found, width = [], self.whole[-1]
        for (offset, size), start, _ in self.ranges if self.matrices else ():
            rows, columns = size[-2:]
            for begin in range(start, start + math.prod(size), rows * columns):
                for top, height in zip(_tops(self.matrices), self.matrices, strict=True):
                    first, last = max(top, offset[-2]), min(top + height, offset[-2] + rows)
                    if first < last:
                        found.append(MatrixPart(
                            (height, width), (first - top, offset[-1]), (last - first, columns),
                            begin + (first - offset[-2]) * columns,
                        ))  # fmt: skip
        return found


@dataclass(frozen=True)
class MatrixPart:
    """A rank's part of one matrix of a weight.

    Attributes:
        shape: (rows, columns) of the whole matrix. offset, size: the box of the matrix that is here.
        start: where it begins in the flattened local weight, in elements; the box is contiguous there, row by row.
    """

    shape: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]
    start: int

    @property
    def stop(self) -> int:
        """One past its last element in the flattened local weight."""
        return self.start + self.size[0] * self.size[1]


def _tops(heights: Sequence[int]) -> list[int]:
    """The first row of each of some matrices that are stacked."""
    return [sum(heights[:index]) for index in range(len(heights))]


def at_box(whole: Tensor, box: Box) -> Tensor:
    """Return the elements of a whole weight in a box, as a view."""
    return whole[tuple(slice(start, start + size) for start, size in zip(*box, strict=True))]


def everything(whole: Sequence[int], replicas: tuple[str, str]) -> Placement:
    """The whole weight on every rank of the axes."""
    shape = tuple(whole)
    return Placement(shape, shape, (((0,) * len(shape), shape),), replicas)


def rows(whole: Sequence[int], ranges: Sequence[range], replicas: tuple[str, str], cut: str = "") -> Placement:
    """Some ranges of a weight's first dimension, in order."""
    tail = tuple(whole[1:])
    boxes = tuple(((part.start, *(0,) * len(tail)), (len(part), *tail)) for part in ranges)
    return Placement(tuple(whole), (sum(map(len, ranges)), *tail), boxes, replicas, cut=cut)


def columns(whole: Sequence[int], part: range, replicas: tuple[str, str], cut: str = "") -> Placement:
    """A range of a weight's last dimension."""
    lead = tuple(whole[:-1])
    shape = (*lead, len(part))
    return Placement(tuple(whole), shape, (((*(0,) * len(lead), part.start), shape),), replicas, cut=cut)


def tensor_rules(parts: int, index: int) -> tuple[WeightRule, WeightRule]:
    """Return the rules of tensor parallelism over the ranks of a node: a rank has rows of the matrices that come first,
    and the columns of the one behind them.
    """

    def first(weight: Weight) -> Placement:
        return rows(weight.shape, stacked_shares(weight.outputs, parts, index), TENSOR, "node")

    def behind(weight: Weight) -> Placement:
        return columns(weight.shape, share(weight.shape[1], parts, index), TENSOR, "node")

    return first, behind


def share(size: int, parts: int, index: int) -> range:
    """The `index`-th of `parts` equal parts of a dimension."""
    width = size // parts
    return range(index * width, (index + 1) * width)


def stacked_shares(heights: Sequence[int], parts: int, index: int) -> list[range]:
    """The rows of the `index`-th of `parts` equal parts of each of some matrices that are stacked."""
    shares = [share(height, parts, index) for height in heights]
    return [range(top + part.start, top + part.stop) for top, part in zip(_tops(heights), shares, strict=True)]
