"""Weights and gradients in flat buffers, one per set of ranks that hold the same weights.

A weight is a view into its buffer and so is its gradient, so synchronisation sends whole buffers without packing,
and the shard of a rank is one slice whatever weights it cuts through (paper, section 4.3: ZeRO). Which ranks those are
is said by the placements: n ranks of a node times d nodes, either of which may be one. The buffer views as [n, d, S],
so that a reduce-scatter inside the node and another between nodes leave row [intra, inter], the shard, where it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.engine.gradient import Gradient
from megascale_moe.kernels.narrow import BLOCK, Float8, Format
from megascale_moe.strategies.placement import Box, Placement

ALIGNMENT = 16  # elements: views start on a cache line


@dataclass(frozen=True)
class Formats:
    """How gradients and updated weights travel.

    Attributes:
        gradients: a name in `narrow_sums.FORMS`. parameters: how weights are written; None: in the compute dtype.
    """

    gradients: str = "fp32"
    parameters: Format | None = None

    @property
    def unit(self) -> int:
        """Elements that are not taken apart, as they share a scale."""
        return BLOCK if self.gradients == "fp8" or isinstance(self.parameters, Float8) else 1


class Slot(NamedTuple):
    """The place of one weight (of the part that this rank holds) in a flat buffer, in elements."""

    name: str
    placement: Placement
    start: int
    stop: int


class Owned(NamedTuple):
    """Elements of a weight that are in this rank's shard.

    Attributes:
        box: of the whole weight. first, last: range of the box flattened row by row.
        place: where the range is in the master shard, and in every tensor shaped like it.
    """

    box: Box
    first: int
    last: int
    place: slice


class FlatWeights:
    """Weights that share replicas and hyper-parameters, in one buffer split evenly over the ranks that hold them.

    Attributes:
        intra, inter: axes of size n and d whose product holds copies of the weights.
        weights: compute dtype [n * d * S]. gradients: float32 [n * d * S].
        shard: this rank's S elements of either, row [intra.index, inter.index] of [n, d, S].
        master: float32 [S], the exact weights of the shard. shares_memory: it is the shard of `weights` itself,
            without a copy; so where the compute dtype is float32 and weights travel as they are.
        formats: how gradients and weights travel to ranks that hold the same weights.
    """

    def __init__(
        self, placements: Mapping[str, Placement], intra: Axis, inter: Axis, *, decay: bool, dtype: torch.dtype,
        device: torch.device, name: str = "weights", formats: Formats | None = None,
    ) -> None:  # fmt: skip
        self.name, self.intra, self.inter, self.decay = name, intra, inter, decay
        self.slots: list[Slot] = []
        end = 0
        for weight, placement in placements.items():
            start, stop = end, end + math.prod(placement.shape)
            self.slots.append(Slot(weight, placement, start, stop))
            end = _round_up(stop, ALIGNMENT)
        ranks = intra.size * inter.size
        self.formats = formats if formats and ranks > 1 else Formats()
        padded = _round_up(end, max(ALIGNMENT, self.formats.unit) * ranks)
        self.weights = torch.zeros(padded, dtype=dtype, device=device)
        self.gradients = torch.zeros(padded, dtype=torch.float32, device=device)
        size, row = padded // ranks, intra.index * inter.size + inter.index
        self.shard = slice(row * size, (row + 1) * size)
        self.shares_memory = dtype == torch.float32 and self.formats.parameters is None
        mine = self.weights[self.shard]
        self.master = mine if self.shares_memory else mine.to(torch.float32, copy=True)

    @property
    def updated(self) -> Tensor:
        """This rank's shard as gathers read it: exact where it is yet to be written in another format."""
        return self.weights[self.shard] if self.formats.parameters is None else self.master

    def round(self) -> Tensor:
        """Round the master to the weights, unless those are what arrives in another format; returns `updated`."""
        if self.rounding_bytes:
            self.updated.copy_(self.master)
        return self.updated

    @property
    def rounding_bytes(self) -> int:
        """Memory traffic of `round`."""
        copies = not self.shares_memory and self.formats.parameters is None
        return (4 + self.weights.itemsize) * self.master.numel() if copies else 0

    def views(self) -> Iterator[tuple[str, Tensor, Gradient]]:
        """Yield (name, weight, gradient) of every weight."""
        for slot in self.slots:
            part, shape = slice(slot.start, slot.stop), slot.placement.shape
            yield slot.name, self.weights[part].view(shape), Gradient(self.gradients[part].view(shape))

    def clear_padding(self) -> None:
        """Zero what belongs to no gradient, where it was used for something else."""
        for slot, following in zip_longest(self.slots, self.slots[1:]):
            self.gradients[slot.stop : following.start if following else None] = 0

    def set(self, slot: Slot, value: Tensor) -> None:
        """Fill one weight, and this rank's part of its master, from a float32 tensor of the local shape."""
        flat = value.flatten()
        self.weights[slot.start : slot.stop] = flat.to(self.weights.dtype)
        first, last = max(slot.start, self.shard.start), min(slot.stop, self.shard.stop)
        if first < last:
            self.master[self._in_shard(first, last)] = flat[first - slot.start : last - slot.start]

    def owned(self, slot: Slot) -> Iterator[Owned]:
        """Yield what this rank's shard holds of a weight, box by box; over all ranks every element of a box once."""
        for box, start, stop in slot.placement.ranges:
            origin = slot.start + start
            first, last = max(origin, self.shard.start), min(slot.start + stop, self.shard.stop)
            if first < last:
                yield Owned(box, first - origin, last - origin, self._in_shard(first, last))

    def _in_shard(self, start: int, stop: int) -> slice:
        return slice(start - self.shard.start, stop - self.shard.start)


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
