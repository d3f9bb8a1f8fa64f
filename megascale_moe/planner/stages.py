"""The lists of a rank of a cluster that you do not have, and how long a micro-batch takes in some of its layers.

Lists are those that a trainer builds for the same config and rank, without process groups and on tensors without
storage, so what is priced, compared or drawn is what runs. They have at most two layers of each kind.
Layers of a kind are alike, so of many only one and two are built, and each further one takes what the second took more
than the first: in a list whose communication hides behind the neighbouring layer, too, the borders are those of any
depth. That makes a layout of sixty layers as cheap as one of two. And what was found once serves every layout that
has the same inside of a stage, whatever its pipeline and its data parallelism: a search meets it again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from megascale_moe.comm.axis import axes_of
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ModelConfig, TrainConfig
from megascale_moe.engine.op import Op
from megascale_moe.engine.order import Span, best_order, makespan
from megascale_moe.optim.groups import flat_groups
from megascale_moe.optim.registry import rule_of
from megascale_moe.optim.sharded import ShardedOptimizer
from megascale_moe.pipeline.batches import DTYPES, micro_batch
from megascale_moe.pipeline.program import Profile, StepPlan
from megascale_moe.pipeline.step import Stage, action_ops, in_micro_batch
from megascale_moe.pipeline.storageless import META
from megascale_moe.planner.price import Prices
from megascale_moe.strategies.stages import Part
from megascale_moe.strategies.weights import placements

FEW = 2
"""Layers of a kind of which a list is built at most."""


def plan_of(config: Config, mesh: Mesh, rank: int, profile: Profile | None = None) -> StepPlan:
    """Return the plan of a rank's step.

    Args:
        profile: how long its operators take, for what is derived from times.
    """
    rows = micro_batch(config, mesh)
    return StepPlan(
        config.model, config.parallel, axes_of(mesh, rank, "nccl"), DTYPES[config.train.dtype], rows,
        config.train.global_batch // mesh.dp // rows, device=META, overlap=config.overlap, wire=config.wire,
        profile=profile or Profile(),
    )  # fmt: skip


def optimizer_of(
    plan: StepPlan, train: TrainConfig, part: Part | None = None, *, by_layer: bool | None = None
) -> ShardedOptimizer:
    """Return the optimizer of the weights of the rank that a plan is for, or of some of its layers.

    Args:
        by_layer: whether a layer's gradients travel on their own; None: as the plan's order says.
    """
    hides = plan.overlap.hides_synchronisation if by_layer is None else by_layer
    groups = flat_groups(
        placements(plan.model, plan.layout, part or plan.part), plan.axes, plan.dtype, META,
        by_layer=hides, wire=plan.wire, rule=rule_of(train),
    )  # fmt: skip
    return ShardedOptimizer(groups, plan.axes, train)


class StageKind(NamedTuple):
    """What a part of a model consists of.

    Attributes:
        layers: how many of each kind, in the order of `ModelConfig.layer_kinds`.
        first, last: whether it has the embedding, and the head.
    """

    layers: tuple[int, ...]
    first: bool
    last: bool

    @classmethod
    def of(cls, part: Part, model: ModelConfig) -> StageKind:
        """Return the kind of some layers."""
        counts, kinds = [0] * len(model.layer_kinds), model.kind_of_layer
        for layer in part.layers:
            counts[kinds[layer]] += 1
        return cls(tuple(counts), part.first, part.last)

    @property
    def depth(self) -> int:
        """The layers of all kinds together."""
        return sum(self.layers)

    def at_most(self, count: int) -> StageKind:
        """Return the same with no more than `count` layers of each kind."""
        return self._replace(layers=tuple(min(number, count) for number in self.layers))

    def part(self, model: ModelConfig) -> Part:
        """Return as many layers of each kind: the first that the model has, between which others may be left out."""
        left, chosen = list(self.layers), []
        for layer, kind in enumerate(model.kind_of_layer):
            if left[kind]:
                left[kind] -= 1
                chosen.append(layer)
        return Part(tuple(chosen), self.first, self.last)


class Took(NamedTuple):
    """The seconds of a list, and those of them in which the computation waits for communication."""

    seconds: float
    exposed: float

    @classmethod
    def of(cls, spans: Sequence[Span]) -> Took:
        """Return how long a list takes that is simulated."""
        return cls(makespan(spans), sum(span.exposed for span in spans))


def along(kind: StageKind, measure: Callable[[StageKind], Sequence[float]]) -> list[float]:
    """Return what `measure` finds, straight on from what it finds for few layers and for one less of a kind."""
    most = kind.at_most(FEW)
    numbers = measure(most)
    total = list(numbers)
    for place, count in enumerate(kind.layers):
        if count > FEW:
            less = measure(most._replace(layers=(*most.layers[:place], FEW - 1, *most.layers[place + 1 :])))
            total = [so_far + (count - FEW) * (b - a) for so_far, a, b in zip(total, less, numbers, strict=True)]
    return total


Made = TypeVar("Made")


class Once:
    """A memo: results by a key that says all that they depend on."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def __call__(self, key: Any, make: Callable[[], Made]) -> Made:
        """Return the result of `make`, which is called the first time that the key is met."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made


@dataclass(frozen=True)
class Stages:
    """What layouts that agree inside of a stage have in common.

    Attributes:
        plan: that of any rank of any pipeline that has this layout. prices: its operators' on a cluster; they are put
            on the links that they use there. once: a memo for whatever is found from the lists.
    """

    plan: StepPlan
    train: TrainConfig
    prices: Prices
    once: Once = field(default_factory=Once)

    def lists(self, kind: StageKind) -> Stage:
        """Return the lists of a part."""

        def made() -> Stage:
            stage = self.plan.stage(kind.part(self.plan.model))
            forward, backward = (list(map(self.prices.placed, ops)) for ops in (stage.forward, stage.backward))
            return replace(stage, forward=forward, backward=backward)

        return self.once(("lists", kind), made)

    def spans(self, kind: StageKind, phase: str) -> list[tuple[Op, Span]]:
        """Return when each operator of an action runs; not for deep parts."""
        ops = action_ops(self.lists(kind), phase)
        return list(zip(ops, self.prices.simulated(ops), strict=True))

    def took(self, kind: StageKind, phase: str) -> Took:
        """Return how long an action of a pipeline takes: F, B, W or BW of one micro-batch."""

        def measure(few: StageKind) -> Took:
            ops = action_ops(self.lists(few), phase)
            return self.once((few, phase), lambda: Took.of(self.prices.simulated(ops)))

        return Took(*along(kind, measure))

    def saved(self, kind: StageKind) -> float:
        """Return by how many seconds a forward and another micro-batch's backward take less, woven into each other."""

        def measure(few: StageKind) -> list[float]:
            stage = self.lists(few)
            work = [*in_micro_batch(stage.forward, 0), *in_micro_batch(stage.backward, 1)]
            apart = self.took(few, "F").seconds + self.took(few, "BW").seconds
            return [max(apart - makespan(self.prices.simulated(best_order(work, self.prices.seconds))), 0.0)]

        return along(kind, lambda few: self.once((few, "woven"), lambda: measure(few)))[0]
