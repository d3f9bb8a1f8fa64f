"""Lower bounds of a layout's time and memory, from the lists of one layer: no order of its operators can beat them.

Time: the computation of the busiest rank, or its communication over one link where that takes longer, and the way of
the first micro-batch to it and of the last back. Memory: weights, gradients and optimizer of an average rank, and what
the micro-batches under way keep for their backward by name. Both are below what a layout really takes, so that a search
may pass over a layout whose lower bound is above what it has; a test holds them against prices.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from megascale_moe.config import Config, OverlapConfig
from megascale_moe.engine.op import Stream
from megascale_moe.engine.remat import kept_bytes
from megascale_moe.model.counts import parameter_weights
from megascale_moe.optim.registry import rule_of
from megascale_moe.pipeline.batches import DTYPES
from megascale_moe.planner.cluster import Cluster
from megascale_moe.planner.space import CandidateLayout
from megascale_moe.planner.stages import Once, StageKind
from megascale_moe.planner.step import Pricer

GRADIENT_BYTES = 4
MASTER_BYTES = 4
"""Bytes of the FP32 master of an element; ranks that hold the same weight share masters and optimizer state."""


class LowerBounds:
    """Lower bounds of the layouts of a space, which share the lists inside of a stage."""

    def __init__(self, config: Config, gpus: int, cluster: Cluster, capacity: float, remats: list[str]) -> None:
        """Take recomputation policies, the mildest first, and the bytes that a rank may hold."""
        self.config, self.gpus, self.cluster, self.capacity, self.remats = config, gpus, cluster, capacity, remats
        layers = Counter(config.model.kind_of_layer)
        self.layers = {
            StageKind(tuple(int(each == kind) for each in range(len(layers))), first=False, last=False): count
            for kind, count in layers.items()
        }
        self.replicated, self.sharded = _weight_bytes(config)
        self._once = Once()

    def of(self, layout: CandidateLayout) -> tuple[float, str]:
        """Return the seconds with the least recomputation that may fit, and its policy; infinite if nothing fits."""
        for remat in self.remats:
            if self.bytes(layout, remat) <= self.capacity:
                return self._seconds(layout, remat), remat
        return math.inf, ""

    def weights(self, layout: CandidateLayout) -> float:
        """Return the bytes that stay from step to step on an average rank."""
        mesh = layout.mesh
        replicated = self.replicated[True] / mesh.ffn + self.replicated[False] / mesh.node
        return (replicated + self.sharded / mesh.stage) / mesh.pp

    def bytes(self, layout: CandidateLayout, remat: str) -> float:
        """Return the bytes of an average rank's weights and of what micro-batches under way keep for backward."""
        mesh, layers = layout.mesh, self.config.model.layers
        alive = layers // mesh.pp * min(mesh.pp, self._micro_batches(layout)) / layers  # of a model's micro-batch
        _, _, kept = self._micro_batch(layout._replace(rows=1), remat)
        return self.weights(layout) + alive * layout.rows * kept

    def _seconds(self, layout: CandidateLayout, remat: str) -> float:
        """Return a lower bound of the seconds of a step."""
        forward, backward, _ = self._micro_batch(layout, remat)
        mesh, layers = layout.mesh, self.config.model.layers
        busiest = 1 / mesh.pp if len(self.layers) > 1 else -(-layers // mesh.pp) / layers
        steady = max(there + back for there, back in zip(forward, backward, strict=True))
        fills = (mesh.pp - 1) / (layout.virtual_stages * mesh.pp)
        drains = 0.0 if layout.schedule == "zero_bubble" else fills
        work = self._micro_batches(layout) * busiest * steady
        return work + fills * max(forward) + drains * max(backward)

    def _micro_batches(self, layout: CandidateLayout) -> int:
        return self.config.train.global_batch // layout.mesh.dp // layout.rows

    def _micro_batch(self, layout: CandidateLayout, remat: str) -> tuple[list[float], list[float], float]:
        """Return the seconds of forward and backward by stream, and the bytes kept between them, in all layers."""

        def made() -> tuple[list[float], list[float], float]:
            overlap = OverlapConfig(remat=remat)  # type: ignore[arg-type]
            # A pricer of its own: lists that no price needs are not kept.
            stages = Pricer(self.cluster).layout(replace(layout.of(self.config), overlap=overlap), self.gpus).stages
            forward, backward, kept = dict.fromkeys(Stream, 0.0), dict.fromkeys(Stream, 0.0), 0.0
            for kind, count in self.layers.items():
                lists = stages.lists(kind)
                kept += count * kept_bytes(lists.forward, lists.backward)
                for ops, seconds in ((lists.forward, forward), (lists.backward, backward)):
                    for op in ops:
                        seconds[op.stream] += count * stages.prices.seconds(op)
            return list(forward.values()), list(backward.values()), kept

        return self._once((remat, layout.inside), made)


def least_bytes(config: Config) -> float:
    """Return the bytes of weights, gradients and optimizer on all ranks together, with nothing held twice."""
    replicated, sharded = _weight_bytes(config)
    return float(sum(replicated.values()) + sharded)


def _weight_bytes(config: Config) -> tuple[dict[bool, int], int]:
    """Return the bytes of weights and gradients, by whether they are experts', and those that ranks share out."""
    rule = rule_of(config.train)
    itemsize = DTYPES[config.train.dtype].itemsize + GRADIENT_BYTES
    replicated, sharded = {True: 0, False: 0}, 0
    for weight in parameter_weights(config.model).values():
        size = math.prod(weight.shape)
        replicated[weight.by_expert] += itemsize * size
        sharded += (MASTER_BYTES + rule.of(weight.matrices).state_bytes) * size
    return replicated, sharded
