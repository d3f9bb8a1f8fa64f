"""The global gradient norm, and clipping by it.

The shards of all groups and ranks are disjoint, so the sum of their squares counts each element of the model once,
whatever the layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.collectives import Pending, all_reduce
from megascale_moe.config import TrainConfig
from megascale_moe.engine.op import Cost, Op, Phase, Stream
from megascale_moe.optim.flat import FlatWeights
from megascale_moe.optim.sync import shard_of

NORM_BYTES = 16
"""Sent by a rank for the all-reduce of one float64: 8 bytes up and 8 bytes down a tree, at most."""

ROW = 1024
"""Elements that are summed in float32."""


def norm_ops(groups: Sequence[FlatWeights], world: Axis) -> list[Op]:
    """Return the operators from the summed gradients of each group's shard to "norm", a float on the host."""
    ops = [
        Op(
            name=f"gradients.{group.name}.squares", reads=(shard_of(group),), writes=(f"{group.name}.squares",),
            run=sum_of_squares, phase=Phase.W, cost=Cost(2 * group.master.numel(), 4 * group.master.numel()),
        )
        for group in groups
    ]  # fmt: skip
    alone = world.size == 1

    def add(*squares: Tensor) -> Tensor | Pending:
        total = torch.stack(squares).sum()
        return total if alone else all_reduce(total, world, NORM_BYTES)

    def root(squares: Tensor) -> float:
        """Return the norm on the host, where clipping is decided; a meta tensor has none."""
        return math.nan if squares.is_meta else float(squares.sqrt())

    total = Op(
        name="gradients.sum_squares" if alone else "gradients.norm_all_reduce",
        reads=tuple(op.writes[0] for op in ops), writes=("squares",), run=add, phase=Phase.W,
        stream=Stream.COMPUTE if alone else Stream.INTER,
        cost=Cost() if alone else Cost(wire_bytes=NORM_BYTES, axis=world.name),
    )  # fmt: skip
    return [*ops, total, Op(name="gradients.norm", reads=("squares",), writes=("norm",), run=root, phase=Phase.W)]


def clipped(gradient: Tensor, norm: float, most: float) -> Tensor:
    """Return a gradient scaled such that the global norm is at most `most` (0: as it is), in place.

    Scaling in place is unlike what operators may do; it is allowed in the last reader of the sums.
    """
    return gradient.mul_(most / (norm + 1e-6)) if most and norm > most else gradient


def clipping_bytes(group: FlatWeights, config: TrainConfig) -> int:
    """Return the memory traffic of `clipped`, which reads and writes the gradient once more."""
    return 8 * group.master.numel() if config.clip_norm else 0


def with_bytes(cost: Cost, memory_bytes: float) -> Cost:
    """Return a cost with more memory traffic."""
    return replace(cost, memory_bytes=cost.memory_bytes + memory_bytes)


def sum_of_squares(x: Tensor) -> Tensor:
    """Return the sum of squares, float64 [], of a float32 vector: in float32 within rows, in float64 over them.

    torch's norm of the whole keeps one running float32 sum per vector lane on a CPU: 1 % too small for 16 million
    elements, and another clipping for another number of shards.
    """
    whole = len(x) // ROW * ROW
    parts = torch.linalg.vector_norm(x[:whole].view(-1, ROW), dim=1), torch.linalg.vector_norm(x[whole:])[None]
    return torch.cat(parts).double().square().sum()
