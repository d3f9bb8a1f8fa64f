"""The global gradient norm, and clipping by it.

The shards of all groups and ranks are disjoint, so the sum of their squares counts each element of the model once,
whatever the layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.collectives import Pending, all_reduce
from megascale_moe.engine.op import Cost, Op, Phase, Stream
from megascale_moe.optim.flat import FlatWeights
from megascale_moe.optim.sync import shard_of

NORM_BYTES = 16
"""Sent by a rank for the all-reduce of one float64: 8 bytes up and 8 bytes down a tree, at most."""


def norm_ops(groups: Sequence[FlatWeights], world: Axis) -> list[Op]:
    """Return the operators from the summed gradients of each group's shard to "norm", a float on the host."""
    return [
        *(_squares_op(group) for group in groups),
        _sum_op(groups, world),
        Op(name="gradients.norm", reads=("squares",), writes=("norm",), run=_root, phase=Phase.W),
    ]


def clipped(gradient: Tensor, norm: float, most: float) -> Tensor:
    """Return a gradient scaled such that the global norm is at most `most` (0: as it is), in place.

    Scaling in place is unlike what operators may do; it is allowed in the last reader of the sums.
    """
    return gradient.mul_(most / (norm + 1e-6)) if most and norm > most else gradient


def _squares_of(group: FlatWeights) -> str:
    return f"{group.name}.squares"


def _squares_op(group: FlatWeights) -> Op:
    """float64 [], of this rank's shard."""
    size = group.master.numel()
    return Op(
        name=f"gradients.{group.name}.squares", reads=(shard_of(group),), writes=(_squares_of(group),),
        run=sum_of_squares, phase=Phase.W, cost=Cost(2 * size, 4 * size),
    )  # fmt: skip


def _sum_op(groups: Sequence[FlatWeights], world: Axis) -> Op:
    """Squares of all groups, summed over all ranks: float64 [], the same bits on every rank."""

    def run(*squares: Tensor) -> Tensor | Pending:
        total = torch.stack(squares).sum()
        if world.size == 1:
            return total
        return all_reduce(total, world, NORM_BYTES)

    alone = world.size == 1
    return Op(
        name="gradients.sum_squares" if alone else "gradients.norm_all_reduce",
        reads=tuple(_squares_of(group) for group in groups), writes=("squares",), run=run, phase=Phase.W,
        stream=Stream.COMPUTE if alone else Stream.INTER,
        cost=Cost() if alone else Cost(wire_bytes=NORM_BYTES, axis=world.name),
    )  # fmt: skip


def _root(squares: Tensor) -> float:
    """The norm as a number of the host, where clipping is decided; a meta tensor has none."""
    return math.nan if squares.is_meta else float(squares.sqrt())


def sum_of_squares(x: Tensor, row: int = 1024) -> Tensor:
    """Sum of squares, float64, of a float32 vector: in float32 within rows, in float64 over them.

    torch's norm of the whole keeps one running float32 sum per vector lane on a CPU: 1 % too small for 16 million
    elements, and another clipping for another number of shards.
    """
    whole = len(x) // row * row
    parts = torch.linalg.vector_norm(x[:whole].view(-1, row), dim=1), torch.linalg.vector_norm(x[whole:])[None]
    return torch.cat(parts).double().square().sum()
