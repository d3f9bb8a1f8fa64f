"""What a micro-batch takes in some layers of a model, seconds and bytes, from lists of at most two of each kind.

Layers of a kind are alike, so of many only one and two are built, and each further one takes what the second took more
than the first: in a list whose communication hides behind the neighbouring layer, too, the borders are those of any
depth. That makes a layout of sixty layers as cheap as one of two. And what was found once serves every layout that
has the same inside of a stage, whatever its pipeline and its data parallelism: a search meets it again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from megascale_moe.config import Config, ModelConfig, TrainConfig
from megascale_moe.engine.cost import Seconds
from megascale_moe.engine.executor import Program
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.memory import Meter
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Op, Stream
from megascale_moe.engine.order import UNDISTURBED, Interference, Span, best_order, makespan, simulate
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.pipeline.step import Stage, action_ops, in_micro_batch
from megascale_moe.pipeline.storageless import META, inputs_without_storage, message_without_storage
from megascale_moe.planner.lists import optimizer_of
from megascale_moe.planner.price import Prices
from megascale_moe.strategies.model import buffers_of
from megascale_moe.strategies.stages import Part

FEW = 2
"""Layers of a kind of which a list is built at most."""


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

    @classmethod
    def one(cls, place: int, model: ModelConfig) -> StageKind:
        """Return a single layer of one of the model's kinds."""
        return cls(tuple(int(place == other) for other in range(len(model.layer_kinds))), first=False, last=False)

    @property
    def depth(self) -> int:
        """Layers in all."""
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
    """Of a list: seconds in all, and those of them in which the computation waits for communication."""

    seconds: float
    exposed: float


class StageBytes(NamedTuple):
    """Of one micro-batch in one stage.

    Attributes:
        kept: from the end of the forward to the backward. forward: the most the forward has at once, what it keeps
            included. backward: the same of the backward, over what was kept.
    """

    kept: float
    forward: float
    backward: float


Numbers = TypeVar("Numbers", bound=tuple[float, ...])  # a named tuple
Made = TypeVar("Made")


def along(kind: StageKind, measure: Callable[[StageKind], Numbers]) -> Numbers:
    """What `measure` finds, straight on from what it finds for few layers and for one less where there are more."""
    most = kind.at_most(FEW)
    found = measure(most)
    total = list(found)
    for place, (deep, few) in enumerate(zip(kind.layers, most.layers, strict=True)):
        if deep > few:
            less = most._replace(layers=(*most.layers[:place], few - 1, *most.layers[place + 1 :]))
            total = [sum_ + (deep - few) * (b - a) for sum_, a, b in zip(total, measure(less), found, strict=True)]
    return type(found)(*total)  # type: ignore[arg-type]


def simulated(ops: Sequence[Op], seconds: Seconds, interference: Interference) -> Took:
    """A list by the executor's rules."""
    spans = simulate(ops, seconds, interference)
    return Took(makespan(spans), sum(span.exposed for span in spans))


def inner(config: Config, node: int, ep: int, etp: int, rows: int) -> Config:
    """What of a config decides about the lists of its layers: configs that agree in it can share a `Stages`."""
    p, t = config.parallel, config.train
    parallel = replace(p, pp=1, dp=0, node=node, ep=ep, etp=etp, schedule="1f1b", virtual_stages=1, stage_layers=())
    train = replace(t, global_batch=rows, micro_batch=rows)
    wire = replace(config.wire, gradients="fp32", parameters="fp32")
    return Config(model=config.model, parallel=parallel, overlap=config.overlap, wire=wire, train=train)


class Once:
    """What was made, by a key that says all it depends on."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def __call__(self, key: Any, make: Callable[[], Made]) -> Made:
        """What `make` makes, the first time."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made


@dataclass(frozen=True)
class Stages:
    """Of one layout inside a stage.

    Attributes:
        plan: that of any rank of any pipeline that has this layout; its profile's prices decide. prices: of a cluster,
            where there is one: its operators are put on the links that they use there. interference: see `simulate`.
    """

    plan: StepPlan
    train: TrainConfig
    prices: Prices | None = None
    interference: Interference = UNDISTURBED
    _once: Once = field(default_factory=Once)

    def lists(self, kind: StageKind) -> Stage:
        """The lists of a part."""

        def made() -> Stage:
            stage = self.plan.stage(kind.part(self.plan.model))
            if self.prices is None:
                return stage
            forward, backward = (list(map(self.prices.placed, ops)) for ops in (stage.forward, stage.backward))
            return replace(stage, forward=forward, backward=backward)

        return self._once(("lists", kind), made)

    def spans(self, kind: StageKind, phase: str) -> list[tuple[Op, Span]]:
        """When each operator of an action runs; not for deep parts."""
        ops = action_ops(self.lists(kind), phase)
        return list(zip(ops, simulate(ops, self.seconds, self.interference), strict=True))

    def _simulated(self, ops: Sequence[Op]) -> Took:
        return simulated(ops, self.seconds, self.interference)

    def took(self, kind: StageKind, phase: str) -> Took:
        """An action of a pipeline: F, B, W or BW of one micro-batch."""

        def measure(few: StageKind) -> Took:
            return self._once((few, phase), lambda: self._simulated(action_ops(self.lists(few), phase)))

        return along(kind, measure)

    def totals(self, kind: StageKind, phase: str) -> dict[Stream, float]:
        """Seconds of an action by stream, as if nothing waited for anything; not for deep parts."""
        found: dict[Stream, float] = dict.fromkeys(Stream, 0.0)
        for op in action_ops(self.lists(kind), phase):
            found[op.stream] += self.seconds(op)
        return found

    def seconds(self, op: Op) -> float:
        """Of an operator."""
        return self.plan.profile.cost.seconds(op)

    def saved(self, kind: StageKind) -> float:
        """Seconds by which a forward and the backward of another micro-batch woven into each other take less."""

        def measure(few: StageKind) -> Took:
            return Took(self._once((few, "woven"), lambda: self._saved(few)), 0.0)

        return along(kind, measure).seconds

    def _saved(self, kind: StageKind) -> float:
        stage = self.lists(kind)
        work = [*in_micro_batch(stage.forward, 0), *in_micro_batch(stage.backward, 1)]
        apart = self.took(kind, "F").seconds + self.took(kind, "BW").seconds
        return max(apart - self._simulated(best_order(work, self.seconds)).seconds, 0.0)

    def bytes(self, kind: StageKind) -> StageBytes:
        """What a micro-batch takes of memory."""

        def measure(few: StageKind) -> StageBytes:
            return self._once((few, "bytes"), lambda: weighed(*self.on_paper(few)))

        return along(kind, measure)

    def on_paper(self, kind: StageKind) -> tuple[StepPlan, Stage, Mapping[str, Tensor], Mapping[str, Gradient]]:
        """What a part needs to run without storage: plan, lists, weights, gradients."""
        plan, part = self.plan, kind.part(self.plan.model)
        optimizer = optimizer_of(plan, self.train, part)
        weights = optimizer.weights | buffers_of(plan.model, part, META)
        return plan, self.lists(kind), weights, optimizer.gradients


def weighed(
    plan: StepPlan, stage: Stage, weights: Mapping[str, Tensor], gradients: Mapping[str, Gradient]
) -> StageBytes:
    """Run a stage's lists once, on tensors without storage."""
    inputs = inputs_without_storage(plan)
    read = {name for op in stage.backward for name in op.reads} - set(inputs)
    coming = [stage.reads] if stage.reads else []
    slope = [grad(stage.writes)] if stage.writes else []
    forward = Program(stage.forward, [*inputs, *coming], read - set(slope), coming)
    meter = Meter()
    with meter:
        values: dict[str, Any] = {**inputs, **{name: message_without_storage(plan) for name in coming}}
        forward.run(values, weights, gradients)
        kept, highest = meter.alive, meter.peak
        meter.peak = meter.alive
        values |= {name: message_without_storage(plan) for name in slope}
        result = [grad(stage.reads)] if stage.reads else []
        spent = [name for name in values if name not in inputs]
        Program(stage.backward, values, result, spent).run(values, weights, gradients)
        values.clear()
        risen = meter.peak - kept
    return StageBytes(kept, highest, risen)
