"""Weights and gradients in flat buffers, one per set of ranks that hold the same weights.

A weight is a view into its buffer and so is its gradient, so synchronisation sends whole buffers without packing,
and the shard of a rank is one slice whatever weights it cuts through (paper, section 4.3: ZeRO). Non-expert weights
are shared by all ranks of a stage, experts only by those that hold the same ones; each has its own axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.engine.gradient import Gradient

ALIGNMENT = 16  # elements: views start on a cache line


@dataclass(frozen=True)
class Slot:
    """One weight's place in a flat buffer, in elements."""

    name: str
    shape: torch.Size
    start: int

    @property
    def stop(self) -> int:
        """One past its last element."""
        return self.start + self.shape.numel()


class FlatWeights:
    """Weights that share replicas and hyper-parameters, in one buffer split evenly over the axis.

    Attributes:
        weights: compute dtype [padded]. gradients: float32 [padded].
        master: float32 [padded / axis.size], this rank's shard of the exact weights; where the compute dtype is
            float32 it is the shard of `weights` itself, without a copy.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], axis: Axis, decay: bool, dtype: torch.dtype,
                 device: torch.device) -> None:
        self.axis = axis
        self.decay = decay
        self.slots: list[Slot] = []
        end = 0
        for name, shape in shapes.items():
            self.slots.append(Slot(name, shape, end))
            end = -(-(end + shape.numel()) // ALIGNMENT) * ALIGNMENT
        unit = ALIGNMENT * axis.size
        padded = -(-end // unit) * unit
        self.weights = torch.zeros(padded, dtype=dtype, device=device)
        self.gradients = torch.zeros(padded, dtype=torch.float32, device=device)
        size = padded // axis.size
        self.shard = slice(axis.index * size, (axis.index + 1) * size)
        mine = self.weights[self.shard]
        self.master = mine if dtype == torch.float32 else mine.float()

    def views(self) -> Iterator[tuple[str, Tensor, Gradient]]:
        """(name, weight, gradient) of every weight."""
        for slot in self.slots:
            part = slice(slot.start, slot.stop)
            gradient = Gradient(self.gradients[part].view(slot.shape))
            yield slot.name, self.weights[part].view(slot.shape), gradient

    def set(self, slot: Slot, value: Tensor) -> None:
        """Fill one weight, and this rank's part of its master, from a float32 tensor of its shape."""
        self.weights[slot.start : slot.stop] = value.flatten().to(self.weights.dtype)
        inside = self.overlap(slot)
        if inside is not None:
            first, last = inside
            self.master_part(slot, first, last).copy_(value.flatten()[first:last])

    def overlap(self, slot: Slot) -> tuple[int, int] | None:
        """The range of a weight's flattened elements that this rank's shard holds, or None."""
        first = max(slot.start, self.shard.start) - slot.start
        last = min(slot.stop, self.shard.stop) - slot.start
        return (first, last) if first < last else None

    def master_part(self, slot: Slot, first: int, last: int, of: Tensor | None = None) -> Tensor:
        """Elements first .. last of a weight in the master shard (or in `of`, any tensor shaped like it)."""
        offset = slot.start - self.shard.start
        return (self.master if of is None else of)[offset + first : offset + last]
