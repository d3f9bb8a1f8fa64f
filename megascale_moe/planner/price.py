"""How long an operator takes on a cluster, from what it declares and nothing else.

The price of computation is the larger of what its FLOPs and what its bytes take, each at the share of the peak that
its kind of work reaches at its size; that of a communication is its bytes over its link, at the share that messages of
that size reach, and a latency. So an operator that a strategy or a pass adds has a price without a word here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megascale_moe.comm.mesh import AXES, Mesh
from megascale_moe.engine.op import Op, Stream, Work
from megascale_moe.planner.cluster import Cluster

PEAKS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Prices:
    """Of the operators of one rank.

    Attributes:
        dtype: in which products are computed. peers: how many ranks each axis has.
    """

    cluster: Cluster
    dtype: torch.dtype
    peers: Mapping[str, int]

    @classmethod
    def of(cls, cluster: Cluster, dtype: torch.dtype, mesh: Mesh) -> Prices:
        """For a rank of a mesh."""
        return cls(cluster, dtype, {axis: mesh.place(axis, 0)[0] for axis in AXES})

    @property
    def peak(self) -> float:
        """FLOP/s of products."""
        return self.cluster.peaks.get(PEAKS[self.dtype], self.cluster.peaks["bf16"])

    def seconds(self, op: Op) -> float:
        """Of one operator."""
        return self._computation(op) if op.stream == Stream.COMPUTE else self._communication(op)

    def _computation(self, op: Op) -> float:
        cost, c = op.cost, self.cluster
        moving = cost.memory_bytes / (c.bandwidth * c.shares[Work.ROWS].at(cost.memory_bytes))
        if cost.work == Work.ROWS:  # so few FLOPs a byte that they hide behind it
            return c.overhead + moving
        return c.overhead + max(moving, cost.flops / (self.peak * c.shares[cost.work].at(cost.size)))

    def _communication(self, op: Op) -> float:
        peers = 1 if op.cost.axis == "pp" else self.peers.get(op.cost.axis, 2) - 1
        return self.cluster.links[op.stream].seconds(op.cost.wire_bytes, peers)
