"""Lower bounds of a layout's time and memory, from the lists of one layer: no order of its operators can beat them.

Time: the computation of the busiest rank, or its communication over one link where that takes longer, and the way of
the first micro-batch to it and of the last back. Memory: weights, gradients and optimizer of an average rank, and what
the micro-batches under way keep for their backward by name. Both are below what a layout really takes, so that a search
may pass over a layout whose floor is above what it has; a test holds them against prices.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from megascale_moe.config import Config, OverlapConfig
from megascale_moe.engine.op import Stream
from megascale_moe.engine.remat import kept_bytes
from megascale_moe.model.counts import parameter_weights
from megascale_moe.optim.registry import rule_of
from megascale_moe.pipeline.batches import DTYPES
from megascale_moe.planner.space import CandidateLayout
from megascale_moe.planner.stages import Once, StageKind, Stages
from megascale_moe.planner.step import Pricer

GRADIENT_BYTES = 4
MASTER_BYTES = 4
"""Bytes of the FP32 master of an element; ranks that hold the same weight share masters and optimizer state."""


class Floors:
    """Lower bounds of the layouts of a space, which share the lists inside of a stage."""

    def __init__(self, config: Config, gpus: int, pricer: Pricer, capacity: float, remats: list[str]) -> None:
        """`remats`: recomputation policies, the mildest first. `capacity`: bytes of a rank."""
        self.config, self.gpus, self.pricer, self.capacity, self.remats = config, gpus, pricer, capacity, remats
        model = config.model
        self.layers = {
            StageKind.one(place, model): model.kind_of_layer.count(place) for place in range(len(model.layer_kinds))
        }
        self.experts, self.others = _sizes_of(config)
        self._once = Once()

    def quick(self, layout: CandidateLayout) -> float:
        """Return the seconds with as little recomputation as is allowed; infinite if not even the weights fit."""
        if self.weights(layout) > self.capacity:
            return math.inf
        return self._seconds(layout, self.remats[0])

    def of(self, layout: CandidateLayout) -> tuple[float, str]:
        """Return the seconds with the least recomputation that may fit, and its policy; infinite if nothing fits."""
        for remat in self.remats:
            if self.bytes(layout, remat) <= self.capacity:
                return self._seconds(layout, remat), remat
        return math.inf, ""

    def bytes(self, layout: CandidateLayout, remat: str) -> float:
        """Return the bytes of an average rank's weights and of what micro-batches under way keep for backward."""
        mesh, model = layout.mesh, self.config.model
        alive = model.layers // mesh.pp * min(mesh.pp, self._micros(layout)) / model.layers  # of a model's micro-batch
        kept = sum(n * self._kept(layout, kind, remat) for kind, n in self.layers.items())
        return self.weights(layout) + alive * kept

    def _micros(self, layout: CandidateLayout) -> int:
        return self.config.train.global_batch // layout.mesh.dp // layout.rows

    def _seconds(self, layout: CandidateLayout, remat: str) -> float:
        """Return a lower bound of the seconds of a step."""
        forward, backward = (
            {stream: sum(n * self._took(layout, kind, phase, remat)[stream] for kind, n in self.layers.items())
             for stream in Stream} for phase in ("F", "BW")
        )  # fmt: skip
        mesh, layers = layout.mesh, self.config.model.layers
        busiest = 1 / mesh.pp if len(self.layers) > 1 else -(-layers // mesh.pp) / layers
        steady = max(forward[stream] + backward[stream] for stream in Stream)
        fills = (mesh.pp - 1) / (layout.virtual_stages * mesh.pp)
        drains = 0.0 if layout.schedule == "zero_bubble" else fills
        work = self._micros(layout) * busiest * steady
        return work + fills * max(forward.values()) + drains * max(backward.values())

    def weights(self, layout: CandidateLayout) -> float:
        """Bytes that stay from step to step on an average rank."""
        mesh, experts, others = layout.mesh, self.experts, self.others
        copied = experts.copied / mesh.ffn + others.copied / mesh.node
        return (copied + (experts.shared + others.shared) / mesh.stage) / mesh.pp

    def _took(self, layout: CandidateLayout, kind: StageKind, phase: str, remat: str) -> dict[Stream, float]:
        """Seconds of a layer and micro-batch by stream."""
        return self._once(
            ("took", kind, phase, remat, layout.inside), lambda: self._stages(layout, remat).totals(kind, phase)
        )

    def _kept(self, layout: CandidateLayout, kind: StageKind, remat: str) -> float:
        """Bytes of a layer and micro-batch from forward to backward; in proportion to its sequences."""
        one = layout._replace(rows=1)

        def kept() -> float:
            lists = self._stages(one, remat).lists(kind)
            return kept_bytes(lists.forward, lists.backward)

        return layout.rows * self._once(("kept", kind, remat, one.inside), kept)

    def _stages(self, layout: CandidateLayout, remat: str) -> Stages:
        serial = replace(layout.of(self.config), overlap=OverlapConfig(remat=remat))  # type: ignore[arg-type]
        return self.pricer.layout(serial, self.gpus).stages


def least_bytes(config: Config) -> float:
    """Return the bytes of weights, gradients and optimizer on all ranks together, with nothing held twice."""
    return float(sum(sizes.copied + sizes.shared for sizes in _sizes_of(config)))


class _Bytes(NamedTuple):
    """Bytes of some weights of the model: on every rank that holds the weight, and shared out over all of them."""

    copied: int
    shared: int


def _sizes_of(config: Config) -> tuple[_Bytes, _Bytes]:
    """Weights and gradients, masters and the optimizer's state: of experts, and of the other weights."""
    rule = rule_of(config.train)
    itemsize = DTYPES[config.train.dtype].itemsize + GRADIENT_BYTES
    found = {True: _Bytes(0, 0), False: _Bytes(0, 0)}
    for weight in parameter_weights(config.model).values():
        size = math.prod(weight.shape)
        copied, shared = found[weight.by_expert]
        state = MASTER_BYTES + rule.of(weight.matrices).state_bytes
        found[weight.by_expert] = _Bytes(copied + itemsize * size, shared + state * size)
    return found[True], found[False]
