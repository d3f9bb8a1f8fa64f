"""Boxes: N-dimensional intervals of a tensor's index space.

Everything a rank holds or wants is a box, or a flat range of a box flattened row by row. A flat range is itself at
most 2 N - 1 boxes, each contiguous, one after the other; so there is one operation, the intersection of two boxes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

Index = tuple[int, ...]


class Box(NamedTuple):
    """The elements `offset[d] <= index[d] < offset[d] + size[d]` of a tensor; no dimensions: the one of a scalar."""

    offset: Index
    size: Index

    @property
    def volume(self) -> int:
        """Elements inside."""
        return prod(self.size)

    def inside(self, shape: Index) -> bool:
        """Whether a tensor of that shape has all of these elements."""
        return len(self.offset) == len(self.size) == len(shape) and all(
            offset >= 0 and size >= 0 and offset + size <= extent
            for offset, size, extent in zip(self.offset, self.size, shape, strict=True)
        )

    def slices(self, origin: Index) -> tuple[slice, ...]:
        """How to index this box in a tensor whose first element is at `origin`."""
        starts = [offset - base for offset, base in zip(self.offset, origin, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.size, strict=True))


def intersect(a: Box, b: Box) -> Box | None:
    """The elements in both, None if there are none."""
    offset, size = [], []
    for a_start, a_size, b_start, b_size in zip(a.offset, a.size, b.offset, b.size, strict=True):
        start = max(a_start, b_start)
        extent = min(a_start + a_size, b_start + b_size) - start
        if extent <= 0:
            return None
        offset.append(start)
        size.append(extent)
    return Box(tuple(offset), tuple(size))


def row_major(size: Index) -> Index:
    """How far apart neighbours are in memory, per dimension, in a box flattened row by row."""
    return tuple(prod(size[dim + 1 :]) for dim in range(len(size)))


def dot(a: Sequence[int], b: Sequence[int]) -> int:
    """Sum of products: with an index and strides, the place in memory."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def flat_range(box: Box, start: int, length: int) -> list[Box]:
    """Elements `start` to `start + length` of the box flattened row by row, as contiguous boxes in that order.

    0 1 2 3      start 2, length 7:    . . 2 3    the end of a row
    4 5 6 7                            4 5 6 7    whole rows
    8 9 . .                            8 . . .    the beginning of a row
    """
    if length == 0:
        return []
    if length == box.volume:
        return [box]
    row = Box(box.offset[1:], box.size[1:])
    first, head = divmod(start, row.volume)
    last, tail = divmod(start + length, row.volume)
    if first == last:
        return _in_row(box, first, flat_range(row, head, length))
    boxes = _in_row(box, first, flat_range(row, head, row.volume - head)) if head else []
    full = first + bool(head)
    if last > full:
        boxes.append(Box((box.offset[0] + full, *row.offset), (last - full, *row.size)))
    return boxes + _in_row(box, last, flat_range(row, 0, tail))


def _in_row(box: Box, row: int, parts: list[Box]) -> list[Box]:
    return [Box((box.offset[0] + row, *part.offset), (1, *part.size)) for part in parts]


def first_fault(shape: Index, boxes: Sequence[Box]) -> tuple[Index, int] | None:
    """The first element of a tensor that not exactly one box contains, and how many do; None if there is no such.

    A sweep along the first dimension, and inside each stretch between two box borders along the next one: linear in
    the boxes for rows, columns, experts and flat ranges, so 10^4 of them are no matter.
    """
    return _first_fault(shape, 0, boxes)


def _first_fault(shape: Index, dim: int, boxes: Sequence[Box]) -> tuple[Index, int] | None:
    if dim == len(shape):
        return None if len(boxes) == 1 else ((), len(boxes))
    starting: dict[int, list[Box]] = defaultdict(list)
    borders = {0}
    for box in boxes:
        starting[box.offset[dim]].append(box)
        borders |= {box.offset[dim], box.offset[dim] + box.size[dim]}
    current: list[Box] = []
    for border in sorted(border for border in borders if border < shape[dim]):
        current = [box for box in current if box.offset[dim] + box.size[dim] > border] + starting[border]
        fault = _first_fault(shape, dim + 1, current)
        if fault:
            return (border, *fault[0]), fault[1]
    return None
