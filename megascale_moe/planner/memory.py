"""Bytes that a step takes on a rank, from one micro-batch of each kind of stage on tensors without storage.

A dry run executes the whole list, every micro-batch. They are alike, so here the forward and the backward of a stage
are executed once and weighed: what a forward keeps for its backward, and how far each rises above that while it runs.
The schedule says how many are alive, and the peak follows. The end of a step, where gradients are summed and few
micro-batches are left, is executed as it is. What is left out are messages of a pipeline that have arrived early or
are not yet acknowledged; a test holds the result against dry runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from megascale_moe.engine.executor import Program
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.memory import Meter
from megascale_moe.engine.op import grad
from megascale_moe.optim.sharded_adamw import ShardedAdamW
from megascale_moe.parallel.model import buffers_of
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.pipeline.schedule import Action
from megascale_moe.pipeline.step import Stage
from megascale_moe.pipeline.storageless import (
    META,
    inputs_without_storage,
    message_without_storage,
    step_inputs_without_storage,
)


@dataclass(frozen=True)
class StageBytes:
    """Of one micro-batch in one stage.

    Attributes:
        kept: from the end of the forward to the backward. forward: the most the forward has at once, what it keeps
            included. backward: the same of the backward, over what was kept.
    """

    kept: int
    forward: int
    backward: int


@dataclass(frozen=True)
class RankBytes:
    """Of one rank.

    Attributes:
        activations: the most that micro-batches take at once. update: the most at the end of a step, when gradients
            are summed and weights are updated. peak: of everything together.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    update: int
    peak: int


def rank_bytes(plan: StepPlan, optimizer: ShardedAdamW) -> RankBytes:
    """Of the rank that a plan is for, which builds its lists.

    Args:
        optimizer: of the rank's weights, on the meta device.
    """
    buffers = buffers_of(plan.model, plan.part, META)
    weights = optimizer.weights | buffers
    of_stage = {number: _weighed(plan, stage, weights, optimizer.gradients) for number, stage in plan.stages.items()}
    stays = optimizer.held_bytes()
    stays["parameters"] += sum(buffer.nbytes for buffer in buffers.values())
    activations = _peak(plan.schedule[plan.axes["pp"].index], of_stage)
    hidden = plan.overlap.hides_synchronisation
    update = _last_micro(plan, weights, optimizer) if hidden else _update(optimizer)
    peak = sum(stays.values()) + max(activations, update)
    return RankBytes(**stays, activations=activations, update=update, peak=peak)


def _peak(actions: Sequence[Action], of_stage: Mapping[int, StageBytes]) -> int:
    """The most that is alive while a rank goes through its actions."""
    alive = peak = 0
    for action in actions:
        stage = of_stage[action.stage]
        if action.phase == "F":
            peak = max(peak, alive + stage.forward)
            alive += stage.kept
        else:
            peak = max(peak, alive + stage.backward)
            alive -= stage.kept if "W" in action.phase else 0
    return peak


def _weighed(
    plan: StepPlan, stage: Stage, weights: Mapping[str, Tensor], gradients: Mapping[str, Gradient]
) -> StageBytes:
    """Run a stage's lists once."""
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


def _last_micro(plan: StepPlan, weights: Mapping[str, Tensor], optimizer: ShardedAdamW) -> int:
    """The most that a step of as few micro-batches as the schedule has takes, with synchronisation inside."""
    few = replace(plan, micros=plan.parallel.pp if plan.parallel.schedule == "interleaved" else 1)
    more = optimizer.given(0.0) | optimizer.updated()
    program = few.program(optimizer.hidden(few.ops), list(more), ["norm"])
    meter = Meter()
    with meter:
        program.run(step_inputs_without_storage(few) | more, weights, optimizer.gradients)
    return meter.peak


def _update(optimizer: ShardedAdamW) -> int:
    """The most that synchronisation and update have at once."""
    meter = Meter()
    with meter:
        optimizer.step(0.0)
    return meter.peak
