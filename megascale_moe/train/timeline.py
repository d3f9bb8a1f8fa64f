"""The timeline that a run leaves (timeline.json): when each operator of a step ran, and how much memory was alive.

It is the document of a rank's step; `megascale report` makes the same for a configuration. It holds the step twice, as
two lists on one clock: what the strategies wrote down, in which a communication is waited for almost where it stands,
and what the order, the splitting and the policy of the run make of it. Both come from `engine.order.simulate` with the
same seconds per operator, so that nothing but the list differs. What a step really took is kept beside them. All is
plain JSON, with operators as rows of a table rather than objects: a step has hundreds of them, and the names of the
columns would be most of the file.

Memory is that of a real step, seen from between its operators; what lives only inside an operator is not seen. A
rehearsal without storage would do for a run, too (`megascale report` has one), but torch imports its compiler for it:
two seconds at the end of every run. Looking at the values of one real step costs that step a little time, so it is one
that no other picture shows, and steps of very many operators are left to a rehearsal.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, TypeVar

import numpy as np

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import OverlapConfig, TrainConfig
from megascale_moe.engine.cost import Kind, Measured, Priced, Rates, kind_of, work_of
from megascale_moe.engine.memory import tensors_in
from megascale_moe.engine.names import parse
from megascale_moe.engine.op import Op, Stream
from megascale_moe.engine.order import Span, simulate
from megascale_moe.engine.remat import kept_bytes
from megascale_moe.engine.trace import Event
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.planner.stages import optimizer_of
from megascale_moe.strategies.stages import Part
from megascale_moe.train.trainer import Trainer

TIMELINE = "timeline.json"
VERSION = 1
WHOLE = 1200
"""Operators of a step that is drawn whole."""

PART = 400
"""Operators of a part that is drawn in place of a longer step."""

WAITED = 0.1
"""Share of its time for which a communication must have been waited for, so that its end is known."""

POINTS = 600
"""Most points of the curve."""

COLUMNS = ("name", "phase", "stream", "start", "end", "exposed", "bytes")
OPTIMIZER = "O"
"""Stands for the phase of what belongs to no micro-batch: sums over ranks, the update, weights sent back."""

OF_OPTIMIZER = ("gradients.", "update.", "parameters.")
"""How the names of its operators begin."""

DIGITS = 9  # of seconds: nanoseconds
Item = TypeVar("Item")


@dataclass(frozen=True)
class RankStep:
    """A rank's step and how long its operators take.

    Attributes:
        plan: with the overlap of the run. cost: seconds of an operator. source: how they are known, in words.
    """

    plan: StepPlan
    train: TrainConfig
    cost: Priced
    source: str


def step_of(trainer: Trainer, rows: int, micros: int, runs: Sequence[Sequence[Event]]) -> RankStep:
    """Return the step that a trainer has run; `runs`: traces of its last steps.

    A run whose order follows from times has measured them in its first steps, on the plain list (train/profiling.py).
    What it has not, the optimizer's operators or everything, is read off the last steps.
    """
    plan, program = trainer.program(rows, micros, "train")
    ops = [*program.ops, *(() if trainer.hides else trainer.optimizer.ops)]
    cost = observed(ops, [events for events in runs if len(events) == len(ops)])
    source = "Seconds of operators were measured in the last steps of this run."
    profile, config = trainer.profile.cost, trainer.config
    if isinstance(profile, Measured):
        cost = Measured({**cost.seconds_of, **profile.seconds_of}, {**cost.work, **profile.work})
        source = (
            "Seconds of operators were measured in the first steps of this run, which wait for every communication at "
            "once, the optimizer's in the last."
        )
    wanted = replace(plan, overlap=config.overlap, wire=config.wire)  # the run may have ended before it got there
    return RankStep(wanted, config.train, cost, source)


def observed(ops: Sequence[Op], runs: Iterable[Sequence[Event]]) -> Measured:
    """Return the seconds of operators from traces of a list, also where communications are hidden.

    A computation took as long as its event. A communication did if somebody stood waiting for its end; if nobody ever
    did, its shortest event is the best that is known, because an event lasts until the result was read; a shorter
    estimate from rates is taken instead.
    """
    known: dict[Kind, list[float]] = defaultdict(list)
    work: dict[Kind, list[float]] = defaultdict(list)
    seconds: dict[Kind, float] = defaultdict(lambda: math.inf)
    for events in runs:
        for op, event in zip(ops, events, strict=True):
            took, kind = event.end - event.start, kind_of(op)
            work[kind].append(work_of(op))
            if op.stream == Stream.COMPUTE or event.exposed >= WAITED * took:
                known[kind].append(took)
            else:
                seconds[kind] = min(seconds[kind], took, Rates().seconds(op))
    seconds |= {kind: median(values) for kind, values in known.items()}
    return Measured(seconds, {kind: median(values) for kind, values in work.items()})


def with_optimizer(plan: StepPlan, train: TrainConfig) -> list[Op]:
    """Return the list of a step with the optimizer, behind it or inside as the order says."""
    optimizer = optimizer_of(plan, train)
    return optimizer.hidden(plan.ops) if plan.overlap.hides_synchronisation else [*plan.ops, *optimizer.ops]


def document(step: RankStep, mesh: Mesh, rank: int) -> dict[str, Any]:
    """Return the two lists of a step: the same work as the strategies wrote it, and with overlap.

    Of a step that overlaps nothing although there is something to hide, the second is what the scheduler would make.
    """
    plan, overlap = step.plan, step.plan.overlap
    plain = OverlapConfig(remat=overlap.remat, activation_bytes=overlap.activation_bytes)
    plans = {"plain": replace(plan, overlap=plain), "overlapped": plan}

    def events_of(ops: Sequence[Op]) -> list[Event]:
        return simulated(zip(ops, simulate(ops, step.cost.seconds), strict=True))

    events = {"plain": events_of(with_optimizer(plans["plain"], step.train))}
    travels = any(event.stream != Stream.COMPUTE for event in events["plain"])
    supposed, title = overlap.order == "serial" and plan.pieces == 1 and travels, "With overlap"
    if supposed:
        profile, title = replace(plan.profile, cost=step.cost), "With order “scheduled”, which was not used"
        plans["overlapped"] = replace(plan, profile=profile, overlap=replace(overlap, order="scheduled"))
    events["overlapped"] = events_of(with_optimizer(plans["overlapped"], step.train))
    drawn, layers = events, tuple[int, ...]()
    if max(map(len, events.values())) > WHOLE:
        count = layers_within(plans.values(), PART)
        drawn = {name: events_of(layer_ops(each, count)) for name, each in plans.items()}
        layers = first_layers(plan, count).layers
    return {
        "version": VERSION, "rank": rank, "mesh": asdict(mesh), "backend": plan.axes["world"].backend,
        "source": step.source, "micro_batches": plan.micros, "pieces": plan.pieces, "layers": list(plan.part.layers),
        "drawn_layers": list(layers), "supposed": supposed, "title": title,
    } | {name: summary(events[name], drawn[name]) | {"kinds": kinds(events[name])} for name in plans}  # fmt: skip


def measured(events: Sequence[Event], origin: float) -> dict[str, Any]:
    """Return the measured step of a rank that began at `origin`, drawn unless it is too long."""
    return summary(events, events if len(events) <= WHOLE else [], origin)


def first_layers(plan: StepPlan, count: int | None = None) -> Part:
    """Return the first `count` layers of the rank's first stage, or all."""
    whole = plan.parts[min(plan.stages)]
    layers = whole.layers[:count]
    return Part(layers, whole.first, whole.last and len(layers) == len(whole.layers))


def layer_ops(plan: StepPlan, count: int) -> list[Op]:
    """Return forward and backward of one micro-batch through the first `count` layers of the rank."""
    stage = plan.stage(first_layers(plan, count))
    return [*stage.forward, *stage.backward]


def layers_within(plans: Collection[StepPlan], limit: int) -> int:
    """Return how many layers have at most `limit` operators in each plan, at least one."""
    for count in range(len(first_layers(next(iter(plans))).layers), 1, -1):
        if all(len(layer_ops(plan, count)) <= limit for plan in plans):
            return count
    return 1


# --- events as JSON ---------------------------------------------------------------------------------------------------


def simulated(spans: Iterable[tuple[Op, Span]], start: float = 0.0) -> list[Event]:
    """Return the events of a list that was simulated, begun at second `start`."""
    return [
        Event(op.name, op.phase, op.stream, start + span.start, start + span.end, int(op.cost.wire_bytes),
              start + span.end - span.exposed)
        for op, span in spans
    ]  # fmt: skip


def phase_of(op: Op | Event) -> str:
    """Return the phase, or that an operator belongs to the optimizer."""
    return OPTIMIZER if op.name.startswith(OF_OPTIMIZER) else str(op.phase)


def summary(events: Sequence[Event], drawn: Sequence[Event], origin: float = 0.0) -> dict[str, Any]:
    """Return the JSON of a step that began at `origin`: totals of `events`, and `drawn` as a table."""
    rows = [
        [event.name, phase_of(event), str(event.stream),
         *(round(value, DIGITS) for value in (event.start - origin, event.end - origin, event.exposed)),
         event.wire_bytes]
        for event in drawn
    ]  # fmt: skip
    return {
        "totals": totals(events, origin), "table": {"columns": list(COLUMNS), "rows": rows},
        "drawn_seconds": totals(drawn, origin)["seconds"],
    }  # fmt: skip


def totals(events: Sequence[Event], origin: float = 0.0) -> dict[str, Any]:
    """Return seconds of a step: until its end, of communication, and of waiting for it."""
    return {
        "operators": len(events),
        "seconds": max((event.end for event in events), default=origin) - origin,
        "communication": sum(event.end - event.start for event in events if event.stream != Stream.COMPUTE),
        "exposed": sum(event.exposed for event in events),
    }


def kinds(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return communications by what they are: layers, pieces and micro-batches added up, in the order of the list.

    `exposed` is how long they travelled while computation stood still, whichever of them it stood still for: of two
    that travel at a time only one is waited for, but the other is not hidden either.
    """
    waits = [(event.end - event.exposed, event.end) for event in events if event.exposed > 0]
    starts, ends = np.array(waits).reshape(-1, 2).T
    by_kind: dict[tuple[str, str, str], dict[str, Any]] = {}
    for event in events:
        if event.stream != Stream.COMPUTE:
            key = (parse(event.name).tensor, phase_of(event), str(event.stream))
            empty = {"count": 0, "bytes": 0, "seconds": 0.0, "exposed": 0.0}
            kind = by_kind.setdefault(key, dict(zip(("name", "phase", "stream"), key, strict=True)) | empty)
            kind["count"] += 1
            kind["bytes"] += event.wire_bytes
            kind["seconds"] += event.end - event.start
            common = np.minimum(ends, event.end) - np.maximum(starts, event.start)
            kind["exposed"] += float(common.clip(0).sum())
    return list(by_kind.values())


def bundles(items: Sequence[Item], most: int) -> list[Sequence[Item]]:
    """Cut a curve into at most `most` bundles of neighbours, each but the last of the same length."""
    width = -(-len(items) // most) or 1
    return [items[start : start + width] for start in range(0, len(items), width)]


# --- memory -----------------------------------------------------------------------------------------------------------


class Watch:
    """Looks at a step without waiting for what is still travelling; `observe` is for `Trainer.step` and `Program.run`.

    Attributes:
        curve: (phase, bytes alive) after each operator; weights, gradients and their like are not in it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.curve: list[tuple[str, int]] = []
        groups = trainer.optimizer.groups
        fixed = (tensor for group in groups for tensor in (group.weights, group.gradients, group.master))
        self._fixed = {tensor.untyped_storage()._cdata for tensor in fixed}

    def observe(self, op: Op, values: dict[str, Any]) -> None:
        """Add up the storages of all that is alive."""
        storages = (tensor.untyped_storage() for value in values.values() for tensor in tensors_in(value))
        alive = {storage._cdata: storage.nbytes() for storage in storages}
        self.curve.append((phase_of(op), sum(size for key, size in alive.items() if key not in self._fixed)))

    def memory(self, trainer: Trainer, plan: StepPlan) -> dict[str, Any]:
        """Return bytes of a rank: what stays, the curve of a step, and what each policy keeps of a micro-batch."""
        points = highest(self.curve)
        return {
            "alive": [alive for _, alive in points], "phases": [phase for phase, _ in points],
            "operators": len(self.curve), "peak": max((alive for _, alive in self.curve), default=0), "whole": True,
            "kept": _kept_by_policy(plan),
        } | trainer.optimizer.held_bytes()  # fmt: skip


def highest(curve: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return at most `POINTS` points of a curve: of neighbours that do not fit the highest."""
    return [max(bundle, key=lambda point: point[1]) for bundle in bundles(curve, POINTS)]


def _kept_by_policy(plan: StepPlan) -> dict[str, int]:
    """Return the bytes that the layers of the rank's first stage keep of one micro-batch for its backward.

    A budget is compared only where one is given.
    """
    by_policy, overlap = dict[str, int](), plan.overlap
    policies = [replace(overlap, remat=remat, activation_bytes=0) for remat in ("none", "paper", "full")]
    for policy in [*policies, *([overlap] if overlap.remat == "budget" else [])]:
        stage = replace(plan, overlap=policy).stage(first_layers(plan))
        by_policy[policy.remat] = round(kept_bytes(stage.forward, stage.backward))
    return by_policy
