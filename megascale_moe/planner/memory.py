"""Bytes that a step takes on a rank, from one micro-batch of each kind of stage on tensors without storage.

A dry run executes the whole list, every micro-batch. They are alike, so here the forward and the backward of a stage
are executed once and weighed: what a forward keeps for its backward, and how far each rises above that while it runs.
The schedule says how many are alive, and the peak follows. The end of a step, where gradients are summed and few
micro-batches are left, is executed as it is, with few layers. What is left out are messages of a pipeline that have
arrived early or are not yet acknowledged; a test holds the result against dry runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megascale_moe.config import TrainConfig
from megascale_moe.engine.executor import Program
from megascale_moe.engine.memory import Meter
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Op
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.pipeline.schedule import Action
from megascale_moe.pipeline.storageless import META, inputs_without_storage, message_without_storage
from megascale_moe.planner.stages import StageKind, Stages, along, optimizer_of
from megascale_moe.strategies.model import buffers_of
from megascale_moe.strategies.stages import parts_of_rank, together


@dataclass(frozen=True)
class RankBytes:
    """Bytes that one rank holds.

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


class StageBytes(NamedTuple):
    """Bytes of one micro-batch in one stage.

    Attributes:
        kept: from the end of the forward to the backward. forward: the most the forward has at once, what it keeps
            included. backward: the same of the backward, over what was kept.
    """

    kept: float
    forward: float
    backward: float


def rank_bytes(
    stages: Stages, plan: StepPlan, train: TrainConfig, place: int, actions: Sequence[Action], *, update: bool = True
) -> RankBytes:  # fmt: skip
    """Return what the ranks at a place of a plan's pipeline hold while they go through these actions.

    Args:
        update: look at the end of the step, too, which takes longest; else it counts as nothing.
    """
    parts = parts_of_rank(plan.parts, plan.parallel.pp, place)
    of_stage = {number: _stage_bytes(stages, StageKind.of(part, plan.model)) for number, part in parts.items()}
    whole = together(parts)
    optimizer = optimizer_of(plan, train, whole)
    stays = optimizer.held_bytes()
    stays["parameters"] += sum(buffer.nbytes for buffer in buffers_of(plan.model, whole, META).values())
    activations, end = round(_peak(actions, of_stage)), 0
    if update and plan.overlap.hides_synchronisation:
        kind = StageKind.of(whole, plan.model)
        last = StageBytes(*along(kind, lambda few: _weighed(stages, plan, train, few, end=True)))
        end = round(max(last.forward, last.kept + last.backward))
    elif update:
        with Meter() as meter:
            optimizer.step(0.0)
        end = meter.peak
    return RankBytes(**stays, activations=activations, update=end, peak=sum(stays.values()) + max(activations, end))


def _peak(actions: Sequence[Action], of_stage: Mapping[int, StageBytes]) -> float:
    """Return the most that is alive while a rank goes through its actions."""
    alive = peak = 0.0
    for action in actions:
        stage = of_stage[action.stage]
        if action.phase == "F":
            peak = max(peak, alive + stage.forward)
            alive += stage.kept
        else:
            peak = max(peak, alive + stage.backward)
            alive -= stage.kept if "W" in action.phase else 0
    return peak


def _stage_bytes(stages: Stages, kind: StageKind) -> StageBytes:
    """Return what a micro-batch takes in a stage."""

    def measure(few: StageKind) -> StageBytes:
        return stages.once((few, "bytes"), lambda: _weighed(stages, stages.plan, stages.train, few))

    return StageBytes(*along(kind, measure))


def _weighed(stages: Stages, plan: StepPlan, train: TrainConfig, few: StageKind, *, end: bool = False) -> StageBytes:
    """Run the lists of a stage of few layers once, on tensors without storage.

    Args:
        end: with synchronisation and update among their operators.
    """
    stage, part, meter = stages.lists(few), few.part(plan.model), Meter()
    optimizer = optimizer_of(plan, train, part)
    weights = optimizer.weights | buffers_of(plan.model, part, META)
    inputs, kept, highest = inputs_without_storage(plan), 0, 0

    def turn() -> Tensor | None:
        """Between forward and backward, where the gradient of the stage's result arrives."""
        nonlocal kept, highest
        kept, highest, meter.peak = meter.alive, meter.peak, meter.alive
        return message_without_storage(plan) if stage.writes else None

    turning = Op(name="turn", reads=(), writes=(grad(stage.writes),) if stage.writes else (), run=turn)
    ops, hidden = [*stage.forward, turning, *stage.backward], [stage.reads] if stage.reads else []
    if end:
        ops, inputs = optimizer.hidden(ops), inputs | optimizer.given(0.0) | optimizer.updated()
    program = Program(ops, [*inputs, *hidden], ["norm"] if end else map(grad, hidden), hidden)
    with meter:
        values = inputs | {name: message_without_storage(plan) for name in hidden}
        program.run(values, weights, optimizer.gradients)
    return StageBytes(kept, highest, meter.peak - kept)
