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
        """Return whether a tensor of that shape has all of these elements."""
        return len(self.offset) == len(self.size) == len(shape) and all(
            offset >= 0 and size >= 0 and offset + size <= extent
            for offset, size, extent in zip(self.offset, self.size, shape, strict=True)
        )

    def slices(self, origin: Index) -> tuple[slice, ...]:
        """Return how to index this box in a tensor whose first element is at `origin`."""
        starts = [offset - base for offset, base in zip(self.offset, origin, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.size, strict=True))


def intersect(a: Box, b: Box) -> Box | None:
    """Return the elements in both, None if there are none."""
    dims = list(zip(a.offset, a.size, b.offset, b.size, strict=True))
    offset = tuple(max(start, other) for start, _, other, _ in dims)
    size = tuple(min(i + m, j + n) - max(i, j) for i, m, j, n in dims)
    return Box(offset, size) if all(extent > 0 for extent in size) else None


def flat_range(box: Box, start: int, length: int) -> list[Box]:
    """Return elements `start` to `start + length` of the box flattened row by row, as contiguous boxes in that order.

    0 1 2 3      start 2, length 7:    . . 2 3    the end of a row
    4 5 6 7                            4 5 6 7    whole rows
    8 9 . .                            8 . . .    the beginning of a row
    """
    if length == 0:
        return []
    if length == box.volume:
        return [box]
    row = Box(box.offset[1:], box.size[1:])
    boxes = []
    while length:
        index, head = divmod(start, row.volume)
        first, rows = box.offset[0] + index, length // row.volume
        if head or not rows:
            count = min(row.volume - head, length)
            boxes += [Box((first, *part.offset), (1, *part.size)) for part in flat_range(row, head, count)]
        else:
            count = rows * row.volume
            boxes.append(Box((first, *row.offset), (rows, *row.size)))
        start, length = start + count, length - count
    return boxes


def first_fault(shape: Index, boxes: Sequence[Box], dim: int = 0) -> tuple[Index, int] | None:
    """Return the first element of a tensor that not exactly one box contains, and how many do; None if there is none.

    A sweep along the first dimension, and inside each stretch between two box borders along the next one (`dim`):
    linear in the boxes for rows, columns, experts and flat ranges, so 10^4 of them are no matter.
    """
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
        fault = first_fault(shape, current, dim + 1)
        if fault:
            return (border, *fault[0]), fault[1]
    return None
