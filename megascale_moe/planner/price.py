"""How long an operator takes on a cluster, from what it declares and nothing else.

The price of computation is the larger of what its FLOPs and what its bytes take, each at the share of the peak that
its kind of work reaches at its size; that of a communication is its bytes over its link, at the share that messages of
that size reach, and a latency; what stays in the node does not pass the link between nodes. So an operator that a
strategy or a pass adds has a price without a word here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megascale_moe.comm.mesh import AXES, Mesh
from megascale_moe.config import require
from megascale_moe.engine.op import Op, Stream, Work
from megascale_moe.planner.cluster import Cluster

PEAKS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Peers:
    """How many other ranks an axis has; `outside`: of them not in the rank's own node."""

    all: int
    outside: int

    @classmethod
    def of(cls, mesh: Mesh, axis: str) -> Peers:
        """Of rank 0, which every rank's are like."""
        ranks = mesh.ranks(axis, 0)
        return cls(len(ranks) - 1, sum(rank >= mesh.node for rank in ranks))


@dataclass(frozen=True)
class Prices:
    """Of the operators of one rank.

    Attributes:
        dtype: in which products are computed. axes: the peers of a rank on each axis.
    """

    cluster: Cluster
    dtype: torch.dtype
    axes: Mapping[str, Peers]

    @classmethod
    def of(cls, cluster: Cluster, dtype: torch.dtype, mesh: Mesh) -> Prices:
        """For a rank of a mesh."""
        return cls(cluster, dtype, {axis: Peers.of(mesh, axis) for axis in AXES})

    @property
    def peak(self) -> float:
        """FLOP/s of products."""
        name, peaks = PEAKS[self.dtype], self.cluster.peaks
        require(name in peaks, f"cluster profile {self.cluster.name}: gpu.peak_tflops: {name} is missing")
        return peaks[name]

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
        link, sent, peers = self.cluster.links[op.stream], op.cost.wire_bytes, self.axes[op.cost.axis]
        if op.cost.axis == "pp":  # to the next stage alone
            return link.seconds(sent, 1)
        if op.cost.axis == "world":  # one number, up and down a tree
            return link.seconds(sent, math.ceil(math.log2(peers.all + 1)))
        if op.stream == Stream.INTRA:
            return link.seconds(sent, peers.all)
        return link.seconds(sent * peers.outside / max(peers.all, 1), peers.outside)
