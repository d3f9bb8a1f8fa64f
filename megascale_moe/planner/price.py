"""How long an operator takes on a cluster, from what it declares and nothing else.

The price of computation is the larger of what its FLOPs and what its bytes take, each at the share of the peak that
its kind of work reaches at its size; that of a communication is its bytes over its link, at the share that messages of
that size reach, and a latency. Which link that is follows from where ranks stand, `cluster.node` of them in a node:
what stays inside does not pass the link between nodes, whatever `parallel.node` is. So an operator that a strategy or a
pass adds has a price without a word here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from megascale_moe.comm.mesh import AXES, Mesh
from megascale_moe.config import require
from megascale_moe.engine.cost import Seconds
from megascale_moe.engine.op import Op, Stream, Work
from megascale_moe.engine.order import Span, simulate
from megascale_moe.planner.cluster import Cluster, Link

PEAKS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Peers:
    """How many other ranks an axis has.

    Attributes:
        outside: of all, those not in the rank's own node. nodes: further nodes. next: whether the neighbour on the axis
            is outside.
    """

    all: int
    outside: int
    nodes: int
    next: bool

    @classmethod
    def of(cls, mesh: Mesh, axis: str, node: int) -> Peers:
        """Return the peers of rank 0, which stand for every rank's; they are not listed, an axis may have ten thousand.

        Args:
            node: ranks that share a fast link.
        """
        parts = mesh.parts(axis, 0)
        outside = [part[max(-(-(node - part.start) // part.step), 0) :] for part in parts]
        nodes = sum(
            (part[-1] // node - part[0] // node + 1) if part.step < node else len(part) for part in outside if part
        )
        size = sum(map(len, parts))
        second = [rank for part in parts for rank in part[:2]][1:2]
        return cls(size - 1, sum(map(len, outside)), nodes, bool(second) and second[0] >= node)


@lru_cache(maxsize=4096)  # a search meets a mesh with every schedule
def _peers(mesh: Mesh, node: int) -> Mapping[str, Peers]:
    return {axis: Peers.of(mesh, axis, node) for axis in AXES}


@dataclass(frozen=True)
class Prices:
    """Prices of the operators of one rank.

    Attributes:
        dtype: of activations. axes: the peers of a rank on each axis. products: the format in which products with
            weights are computed, a key of the profile's peaks; empty: in `dtype`. Attention is always in `dtype`.
    """

    cluster: Cluster
    dtype: torch.dtype
    axes: Mapping[str, Peers]
    products: str = ""

    @classmethod
    def of(cls, cluster: Cluster, dtype: torch.dtype, mesh: Mesh, products: str = "") -> Prices:
        """Return the prices of a rank of a mesh."""
        return cls(cluster, dtype, _peers(mesh, cluster.node), products)

    @property
    def peak(self) -> float:
        """The FLOP/s of products."""
        return self._peak(PEAKS[self.dtype])

    def _peak(self, name: str) -> float:
        peaks = self.cluster.peaks
        require(name in peaks, f"cluster profile {self.cluster.name}: gpu.peak_tflops: {name} is missing")
        return peaks[name]

    def seconds(self, op: Op) -> float:
        """Return the seconds of one operator."""
        return self._computation(op) if op.stream == Stream.COMPUTE else self._communication(op)

    def simulated(self, ops: Sequence[Op], seconds: Seconds | None = None) -> list[Span]:
        """Return when each operator of a list runs, by the executor's rules.

        Args:
            seconds: how long operators take; None: as priced here.
        """
        return simulate(ops, seconds or self.seconds, self.cluster.interference)

    def hop(self, sent: float) -> float:
        """Return the seconds of a message to the next stage of a pipeline."""
        return self._link(self.axes["pp"].next).seconds(sent, 1)

    def placed(self, op: Op) -> Op:
        """Return an operator on the stream that it occupies here: what stays in a node does not queue for the NIC."""
        inside = op.stream == Stream.INTER and op.cost.axis != "pp" and not self.axes[op.cost.axis].outside
        return replace(op, stream=Stream.INTRA) if inside else op

    def _link(self, outside: bool) -> Link:
        return self.cluster.links[Stream.INTER if outside else Stream.INTRA]

    def _computation(self, op: Op) -> float:
        cost, c = op.cost, self.cluster
        computes = cost.work == Work.ROWS and cost.flops > 0
        share = c.formulas if computes and c.formulas is not None else c.shares[Work.ROWS]
        moving = cost.memory_bytes / (c.bandwidth * share.at(cost.memory_bytes))
        if cost.work == Work.ROWS:  # so few FLOPs a byte that they hide behind it
            return c.overhead + moving
        flops = cost.flops * (c.imbalance if cost.work == Work.GROUPED else 1.0)
        narrow = self.products if cost.work in (Work.PRODUCT, Work.GROUPED) else ""
        peak = self._peak(narrow) * c.narrow if narrow else self.peak
        return c.overhead + max(moving, flops / (peak * c.shares[cost.work].at(cost.size)))

    def _communication(self, op: Op) -> float:
        sent, peers = op.cost.wire_bytes, self.axes[op.cost.axis]
        if op.cost.axis == "pp":
            return self.hop(sent)
        if op.cost.axis == "world":  # one number, up and down a tree
            return self._link(peers.outside > 0).seconds(sent, math.ceil(math.log2(peers.all + 1)))
        copies = 1.0
        if op.traffic is not None and op.traffic.plan:  # its sizes follow from routing
            sent *= self.cluster.imbalance
            copies = self.cluster.dispatch
        if not peers.outside:
            return self._link(False).seconds(sent, peers.all)
        between = peers.nodes if op.cost.ring and self.cluster.rings else peers.outside
        inside = peers.all - peers.outside
        return max(
            self._link(True).seconds(copies * sent * between / peers.all, between),
            self._link(False).seconds(sent * inside / peers.all, inside),
        )
